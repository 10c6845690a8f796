"""The way in for ONNX files: any graph of named tensors becomes an nn.Module, decoders a causal LM.

One way, without a second frontend::

    model.onnx ──read──▶ Model ──module──▶ nn.Module ──capture──▶ fx ──lower──▶ ir.Graph ──▶ passes
               checks      weights, steps     rules: an ONNX op as torch calls

- ``model.py`` holds what a file says as plain data; ``reader.py`` checks a file (protobuf, opsets,
  domains, external data, ops without a rule) before anything is computed; ``tensors.py`` maps its
  tensors from disk, and by ``weights.py`` linears that are in codes stay expressions over codes.
- ``rules/`` has one file an op family: a rule says one ONNX op in torch calls. The lowering from
  ATen to the IR exists already, with its fallback for what has no IR op, and torch.export keeps the
  symbolic sizes: a table from ONNX straight to the IR would say all of that again.
- ``values.py`` and ``rules/known.py`` are the static half: sizes, small integers, counting vectors
  and constants are computed while the module is traced, symbols included, so that Shape, Gather,
  Concat and Reshape over sizes leave nothing in the graph.
- ``module.py`` runs the steps as a plain graph: tensors in and out by the file's names.
- ``decoder.py`` recognises a decoder by its names (codegen/onnx/export.py has the layout). It is
  run over one whole sequence: batch 1, positions 0 … S - 1, logits of every row, caches of length
  S. Then what writes a cache writes all of it, what reads one reads the new tokens, and attention
  over a static cache *is* causal attention of the sequence: the ordinary passes put their own KV
  cache in.
- ``source.py`` makes of all this the Source that `compile` takes.

What is refused: opsets before 13 or beyond the installed onnx, ops without a rule whose standard
gives no body either, control flow, sizes that depend on data, caches of attention ops that already
hold tokens. Experts that a file spells with NonZero and ScatterND are among these. MatMulInteger
runs in float64: exact, but slow.
"""

from .source import missing_profile, open_onnx

__all__ = ["missing_profile", "open_onnx"]

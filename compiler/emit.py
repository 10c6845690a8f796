"""`tilewright.export_onnx`: from a model to a folder that stock ONNX runtimes run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..errors import UnsupportedError
from ..formats.atomic import atomic_folder
from ..ir.dtypes import DType
from ..ir.graph import Graph
from ..passes.expert_codes import expert_codes
from ..passes.heads import GQA
from ..passes.keep_codes import expanded_weights
from ..passes.schemes import QuantConfig
from ..version import __version__
from .api import Phases, Progress, identifier, sample_ids
from .changes import make_changes
from .emit_files import MODEL, largest_error, runs_on_cpu, save_model
from .emit_source import (
    Changes,
    captured,
    cut_graphs,
    layer_names,
    open_causal_lm,
    slot_graphs,
)
from .options import CompileOptions, context_of, resolve_options, wrong_option
from .sources import Source, source_tokenizer

if TYPE_CHECKING:
    from ..codegen.onnx.export import Exported

FLAVORS = ("standard", "onnxruntime")
GENERATION = "generation.json"
DTYPES = ("auto", "float32", "float16", "bfloat16")
EXPANDED = "{} weights of the checkpoint's codes become numbers, such as {}: no op here reads them"
UNRUN = (
    "a bfloat16 model is checked, and not run: onnxruntime has kernels that compute in it for GPUs "
    "alone"
)


@dataclass(frozen=True, slots=True)
class Emitted:
    """What was written.

    Attributes:
        path: the folder.
        flavor: of the ops.
        nodes: of the ONNX graph.
        weight_bytes: of its initializers.
        largest_error: relative, of ONNX Runtime against the interpreter; None where nothing was
            compared.
        notes: what a user may want to know of the conversion.
    """

    path: Path
    flavor: str
    nodes: int
    weight_bytes: int
    largest_error: float | None
    notes: tuple[str, ...]


def export_onnx(
    model: object,
    path: str | Path,
    *,
    flavor: str = "standard",
    quantize: str | QuantConfig | None = None,
    attention: str | GQA | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    verify: str = "sample",
    trust_remote_code: bool = False,
    random_weights: int | None = None,
    progress: Progress | None = None,
) -> Emitted:
    """Writes a causal LM, after the passes, as a folder for ONNX runtimes: ``model.onnx`` of opset
    24 with its weights in ``model.onnx.data`` (floats, or codes), ``generation.json`` and, where
    the model has one, ``tokenizer.json``. codegen/onnx/export.py says what goes in and out.

    Args:
        model: a Hugging Face model, a model folder or a .gguf file.
        path: the folder; one that is there is replaced when the new one is complete.
        flavor: "standard" for ops of the ONNX standard alone; "onnxruntime" for com.microsoft ops
            too, where they are faster.
        quantize: as `compile` takes it; None expands what a checkpoint has in codes.
        attention: as `compile` takes it.
        dtype: of weights, activations and caches: "float32", "float16" or "bfloat16"; "auto" is
            float32, which every runtime computes in. Nothing runs a model of bfloat16 here: see
            `Emitted.notes`.
        max_model_len: longest sequence in tokens, as `compile` takes it.
        verify: as `compile` takes it; ONNX Runtime runs the emitted model of one layer of each kind
            ("sample") or all of it ("full"), beside the interpreter.
        trust_remote_code, random_weights: as `compile` takes them.
        progress: called as phases begin.

    Raises:
        UsageError, CheckpointError, CaptureError: what is wrong with the model or an option.
        UnsupportedError: no causal LM, or an op or scheme that the flavor has no form for.
        VerificationError: a pass or the model computes something else, or is no valid ONNX.
    """
    if flavor not in FLAVORS:
        raise wrong_option("flavor", flavor, FLAVORS)
    if dtype not in DTYPES:
        raise wrong_option("dtype", dtype, DTYPES)
    options = resolve_options(
        target="cpu",
        backend="onnxruntime",
        kv_cache="static",
        dtype="float32" if dtype == "auto" else dtype,
        max_model_len=max_model_len,
        max_batch_size=None,
        verify=verify,
        trust_remote_code=trust_remote_code,
        random_weights=random_weights,
        tune="none",
        quantize="expanded" if quantize is None else quantize,
        attention=attention,
    )
    return _Export(options, flavor, Phases(progress)).write(model, Path(path))


@dataclass(frozen=True, slots=True)
class _Export:
    """One export: what was asked for, and who wants to hear of it."""

    options: CompileOptions
    flavor: str
    phases: Phases

    def write(self, model: object, path: Path) -> Emitted:
        run = self.phases.run
        source = run("open", 0.0, lambda: open_causal_lm(model, self.options))
        graph = run("capture", 0.05, lambda: captured(source, identifier(source.name)))
        limit = context_of(source.max_position_embeddings, self.options)
        changes = run("calibrate", 0.2, lambda: make_changes(graph, source, self.options, limit))
        stands, error = run("verify", 0.25, lambda: self._check_sample(source, limit, changes))
        level = "structure" if stands else self.options.verify
        samples = (sample_ids(graph, limit),)
        passed = run(
            "passes", 0.4, lambda: slot_graphs(graph, changes, level, samples, self.options)
        )
        exported = run("convert", 0.6, lambda: self._exported(passed.final, limit))
        with atomic_folder(path) as folder:
            run("write", 0.7, lambda: save_model(exported, folder))
            if level in ("sample", "full") and runs_on_cpu(exported):
                error = run("check", 0.9, lambda: largest_error(exported, passed, samples, folder))
            tokenizer = source_tokenizer(source)
            if tokenizer is not None:
                tokenizer.save(folder)
            facts = self._facts(exported, passed.final, source, limit)
            (folder / GENERATION).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        model_graph = exported.model.graph
        size = sum(value.const_value.nbytes for value in model_graph.initializers.values())
        notes = (*exported.notes, *(() if runs_on_cpu(exported) else (UNRUN,)))
        return Emitted(path, self.flavor, len(model_graph), size, error, notes)

    def _exported(self, graph: Graph, limit: int) -> Exported:
        from ..codegen.onnx.export import export_decoder
        from ..codegen.onnx.standard import CONVERTERS_OF

        keeps = self.options.stored in ("float", "int8")
        if keeps and self.flavor == "onnxruntime":
            graph = expert_codes(graph, DType.I8 if self.options.stored == "int8" else None)
        try:
            table = CONVERTERS_OF[self.flavor]
            exported = export_decoder(graph, table, layer_names(graph), limit)
            expanded = expanded_weights(graph) if keeps else []
            notes = (EXPANDED.format(len(expanded), expanded[0]),) if expanded else ()
            told = {"tilewright.version": __version__, "tilewright.flavor": self.flavor}
            exported.model.metadata_props.update(told)
            return replace(exported, notes=(*exported.notes, *notes))
        except UnsupportedError as error:
            scheme = self.options.quantize.scheme if self.options.quantize else self.options.stored
            if scheme in (None, "expanded"):
                raise
            raise UnsupportedError(
                f"quantize={scheme!r} in flavor {self.flavor!r}: {error.culprit}",
                expected=error.expected,
                found=error.found,
                remedy="Quantize by fp8 or int8-weight, or int4 with groups that divide columns.",
            ) from error

    def _check_sample(
        self, source: Source, limit: int, changes: Changes
    ) -> tuple[bool, float | None]:
        """Exports and runs the model cut to one layer of each kind: whether that stands for the
        whole one, and its error.
        """
        cut = cut_graphs(source, limit, changes, self.options)
        if cut is None:
            return False, None
        passed, samples = cut
        exported = self._exported(passed.final, limit)
        with TemporaryDirectory(prefix="tilewright-") as folder:
            save_model(exported, Path(folder))
            if not runs_on_cpu(exported):
                return True, None
            return True, largest_error(exported, passed, samples, Path(folder))

    def _facts(
        self, exported: Exported, graph: Graph, source: Source, limit: int
    ) -> dict[str, object]:
        """What generation.json holds: all that a loop over the model has to know."""
        return {
            "model": MODEL,
            "flavor": self.flavor,
            "eos_token_ids": list(source.eos_token_ids),
            "max_length": limit,
            "vocab_size": int(str(graph.outputs[0].shape[-1])),
            "caches": [
                {
                    "past": cache.past,
                    "present": cache.present,
                    "shape": ["batch", cache.heads, "cache_length", cache.width],
                    "dtype": str(cache.dtype.torch).removeprefix("torch."),
                }
                for cache in exported.caches
            ],
        }

"""The emitted ONNX model on disk: written, checked, and run once beside the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import VerificationError
from ..ir.graph import input_name
from ..ir.interpreter import interpret
from .graphs import Passed
from .trial import outputs_error

if TYPE_CHECKING:
    from ..codegen.onnx.export import Exported

MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
# Smaller tensors stand in the model itself, where runtimes read them as constants.
INLINE_BYTES = 1024


def save_model(exported: Exported, folder: Path) -> None:
    """Writes ``model.onnx`` and its weights, one in memory at a time, and has onnx check them.

    Raises:
        VerificationError: the checker refuses the model.
    """
    import onnx
    import onnx_ir

    onnx_ir.save(
        exported.model,
        folder / MODEL,
        external_data=WEIGHTS,
        size_threshold_bytes=INLINE_BYTES,
    )
    try:
        onnx.checker.check_model(str(folder / MODEL), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(
            "the emitted ONNX model",
            expected=f"one that the checker of onnx {onnx.__version__} accepts",
            found=str(error).strip().splitlines()[0],
            remedy="Report it; nothing was written.",
        ) from error


def runs_on_cpu(exported: Exported) -> bool:
    """Whether ONNX Runtime's CPU has kernels for the model's element type: it has none that compute
    in bfloat16.
    """
    import onnx_ir

    return all(
        value.dtype is not onnx_ir.DataType.BFLOAT16 for value in exported.model.graph.outputs
    )


def largest_error(
    exported: Exported, passed: Passed, samples: Sequence[torch.Tensor], folder: Path
) -> float:
    """The largest relative error of the written model, run by ONNX Runtime over one prompt.

    Args:
        exported: the model.
        passed: the graphs that it was made from.
        samples: token ids i64[1, S].
        folder: where the model is written.

    Raises:
        VerificationError: it computes something else than the interpreter.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    session = ort.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
    # The caches of a user are zeros at first; those of the passes' samples are not.
    inputs = [x.nan_to_num(0.0) if x.is_floating_point() else x for x in passed.inputs(samples)]
    with torch.no_grad():
        wanted = interpret(passed.final, inputs)
    every = torch.arange(samples[0].shape[1])[None].numpy()
    given = {"input_ids": samples[0].numpy(), "position_ids": every, "logits_indices": every}
    olds = [
        tensor
        for node, tensor in zip(passed.final.inputs, inputs, strict=True)
        if "_cache_" in input_name(node)
    ]
    given |= {c.past: old.numpy() for c, old in zip(exported.caches, olds, strict=True)}
    logits, *news = map(torch.from_numpy, session.run(None, given))
    found = dict(zip(passed.final.output_names, (logits[0], *news), strict=True))
    return outputs_error("the emitted ONNX model", passed.final, inputs, wanted, found)

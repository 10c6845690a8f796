"""What a user asks of quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...ir.dtypes import DType

METHODS = ("rtn", "gptq", "awq", "smoothquant")
STORED = ("stored", "expanded")
"""What is no scheme: weights that a checkpoint holds in codes keep them, or become numbers."""


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """How a model's linears are quantized: `tw.compile(…, quantize=tw.QuantConfig("int4"))`.

    What is not valid raises UsageError when the model is compiled.

    Attributes:
        scheme: "int8-weight", "int8", "fp8", "fp8-tensor", "fp8-block", "fp8-weight" or "int4"; or
            of a checkpoint in codes "stored" (they are kept) or "expanded" (they become numbers),
            of which "stored" takes ``compute``, and nothing else is taken.
        group: columns that share a scale, 0 for whole rows; None for the scheme's own.
        symmetric: whether codes are centred on zero; else each group has a zero point.
        method: "rtn" (round to nearest), "gptq", "awq", "smoothquant"; None for the scheme's own.
        skip: patterns (as fnmatch has them) of names of weights that stay as they are.
        lm_head: whether the product that gives the logits is quantized too. Embeddings, routers and
            the weights of experts stay.
        calibrate: a text file to calibrate with; None for the text that comes with the package.
        tokens: of the text, that calibration reads at most.
        seed: picks where in the text the samples begin.
        compute: "float", or "int8" to let products of "int4", "int8-weight" and "stored" round
            activations to int8, by groups of columns, on backends that are faster so (onnxruntime's
            accuracy_level 0 and 4). The other schemes say themselves what they compute in.
        report: whether the quality is measured: perplexity, divergence, errors of layers.
        report_text: a text file to measure on; None for the text that comes with the package.
        report_tokens: of that text, that are read at most.
        sensitivity: whether the report says, too, what each linear costs when it is quantized
            alone, and so which to ``skip``.
    """

    scheme: str
    group: int | None = None
    symmetric: bool = True
    method: str | None = None
    skip: Sequence[str] = ()
    lm_head: bool = False
    calibrate: str | Path | None = None
    tokens: int = 8192
    seed: int = 0
    report: bool = False
    report_text: str | Path | None = None
    report_tokens: int = 4096
    compute: str = "float"
    sensitivity: bool = False

    @property
    def rounds_to(self) -> DType | None:
        """The ``compute`` attribute of ``dequantize``."""
        return DType.I8 if self.compute == "int8" else None

"""The ops that have an ONNX form, and how each gets it."""

from __future__ import annotations

from . import (
    attention,
    contractions,
    control,
    elementwise,
    experts,
    norms,
    reductions,
    shapes,
    slots,
)
from .emitter import Converter

CONVERTERS: dict[str, Converter] = {
    **elementwise.CONVERTERS,
    **shapes.CONVERTERS,
    **reductions.CONVERTERS,
    **contractions.CONVERTERS,
    **norms.CONVERTERS,  # its add takes the norm of a residual along
    **attention.CONVERTERS,
    **slots.CONVERTERS,
    **experts.CONVERTERS,
    **control.CONVERTERS,
}
# Caches in pages are for backends that address memory freely; aten is torch itself.
WITHOUT = frozenset(
    {"aten", "append_kv", "kv_write", "paged_attention", "sample"}
    | {"dequantize", "quantize_rows", "scaled_linear"}
)

"""The ops that have an ONNX form, and how each gets it."""

from __future__ import annotations

from . import (
    attention,
    contractions,
    control,
    elementwise,
    experts,
    norms,
    quantized,
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
    **quantized.CONVERTERS,
    **norms.CONVERTERS,  # its add takes the norm of a residual along
    **attention.CONVERTERS,
    **slots.CONVERTERS,
    **experts.CONVERTERS,
    **control.CONVERTERS,
}
# Caches in pages are for backends that address memory freely; aten is torch itself. Weights are
# dequantized within products, or once.
WITHOUT = frozenset(
    {"aten", "append_kv", "dequantize", "kv_write", "paged_attention", "sample"}
    | {"scaled_append_kv", "scaled_paged_attention", "share_pages"}
)

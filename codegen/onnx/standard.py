"""Converters of models that any ONNX runtime takes: ONNX's own ops where the engine's CPU backend
has ONNX Runtime's.

Attention, RMSNormalization, RotaryEmbedding and TensorScatter of opset 24 have been held against
float64 on the CPU of ONNX Runtime 1.32, and are right there: grouped heads, windows, soft caps and
additive masks, head dims of K and V that differ. Attention has no sinks: these, and a soft cap
beside ALiBi, whose order earlier texts of the standard leave open, go by parts.
"""

from __future__ import annotations

import math
from functools import partial

from ...ir.dtypes import DType
from ...ir.node import Node
from . import float8, qmoe
from .attention import computes, scale_of, softcap_of, visibility
from .elementwise import CONVERTERS as ELEMENTWISE
from .emitter import ELEMENT_TYPES, Converter, Emitter, Refusal
from .experts import moe_experts
from .norms import rms_norm
from .qdq import linear
from .slots import (
    Rows,
    by_parts,
    distance_of,
    heads_first,
    is_narrow,
    rows_of,
    slot_attention,
    slot_bias,
)
from .table import CONVERTERS

RMS_NORM = partial(rms_norm, op="RMSNormalization")


def _slot_attention(
    e: Emitter,
    node: Node,
    q: str,
    k: str,
    v: str,
    k_cache: str,
    v_cache: str,
    seq_lens: str,
    sinks: str = "",
    alibi: str = "",
) -> tuple[str, ...] | Refusal:
    refusal = None if is_narrow(node) else computes(node)
    if refusal:
        return refusal
    rows = rows_of(e, node, seq_lens)
    softcap = softcap_of(node)
    if sinks or not node.attr("causal") or (softcap is not None and alibi):
        given = {"k_cache": k_cache, "v_cache": v_cache, "sinks": sinks, "alibi": alibi}
        return by_parts(e, node, rows, (q, k, v), given)
    q, k, v = (
        heads_first(e, rows, name, part)
        for name, part in zip((q, k, v), node.operands[:3], strict=True)
    )
    start = e.once(("rows", rows.lengths, "start"), lambda: e.op("Sub", rows.lengths, rows.steps))
    caches = [
        e.op("TensorScatter", cache, new, start, axis=2)
        for cache, new in ((k_cache, k), (v_cache, v))
    ]
    # What is beyond the longest sequence would cost as much as what is within.
    zero, axis = e.ints(0), e.ints(2)
    keys, values = (e.op("Slice", cache, zero, rows.longest, axis) for cache in caches)
    mask = _mask(e, node, rows, alibi)
    single = ELEMENT_TYPES[DType.F32] if is_narrow(node) else None
    out = e.op(
        "Attention",
        *(q, keys, values, mask),
        scale=scale_of(node),
        softcap=softcap,
        softmax_precision=single,
    )
    out = e.op("Transpose", out, perm=[0, 2, 1, 3])
    return (e.view(out, node.types[0].shape), *caches)


def _mask(e: Emitter, node: Node, rows: Rows, alibi: str) -> str:
    """What each query sees: bool [B, 1, S, L], or what is added, [B, H, S, L], under ALiBi.

    The op has a causal mask of its own, but opset 24 first aligned it otherwise than it does since
    its erratum: a mask means one thing in all runtimes.
    """

    def make() -> str:
        visible = visibility(e, node, distance_of(e, rows))
        if not alibi:
            return visible
        slopes, dtype = node.args[7], node.types[0].dtype
        assert slopes is not None
        bias = slot_bias(e, rows, alibi, slopes.dtype, dtype)
        return e.op("Where", visible, bias, e.scalar(-math.inf, dtype))

    return e.once(("rows", rows.lengths, "mask", node.attr("window"), alibi), make)


STANDARD: dict[str, Converter] = {
    **CONVERTERS,
    "add": ELEMENTWISE["add"],
    "rms_norm": RMS_NORM,
    "slot_attention": _slot_attention,
    "linear": linear,
    "moe_experts": partial(moe_experts, narrow=True),
    **float8.CONVERTERS,
}
"""Nothing but the ops of the ONNX standard."""

MICROSOFT_TOO: dict[str, Converter] = {
    **CONVERTERS,
    # SimplifiedLayerNormalization stands in no operator set that a checker knows.
    "rms_norm": RMS_NORM,
    "linear": partial(linear, packs=True),
    "moe_experts": qmoe.moe_experts,
    "slot_attention": partial(slot_attention, narrow=True),
    **float8.PACKING,
}
"""ONNX Runtime's own ops too, where they are faster: GroupQueryAttention, MatMulNBits, QMoE,
SkipSimplifiedLayerNormalization."""

CONVERTERS_OF: dict[str, dict[str, Converter]] = {
    "standard": STANDARD,
    "onnxruntime": MICROSOFT_TOO,
}

"""Attention over a dense batch as ONNX: matmul, mask, softmax, matmul, with the IR's masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...ir.dims import Size, divide
from ...ir.dtypes import DType
from ...ir.node import Node
from .emitter import ELEMENT_TYPES, Converter, Emitter, Refusal, numpy_type


@dataclass(frozen=True, slots=True)
class Scores:
    """What happens to the scores of q [B, H, S, D] and k [B, H, L, D] before and after the softmax.

    ``visible`` (bool) and ``bias`` are names of values that broadcast to [B, H, S, L], '' for none;
    ``sinks`` of one [1, H, 1, 1].
    """

    dtype: DType
    scale: float
    softcap: float | None = None
    visible: str = ""
    bias: str = ""
    sinks: str = ""


def attend(e: Emitter, q: str, k: str, v: str, how: Scores) -> str:
    """[B, H, S, E]. A row that sees nothing gives 0."""
    keys = e.op("Transpose", k, perm=[0, 1, 3, 2])
    scores = e.op("Mul", e.op("MatMul", q, keys), e.scalar(how.scale, how.dtype))
    if how.softcap is not None:
        cap = e.scalar(how.softcap, how.dtype)
        scores = e.op("Mul", e.op("Tanh", e.op("Div", scores, cap)), cap)
    seen = how.visible
    # The lowest finite number for what is masked: its weight is 0 beside any other, and never NaN.
    lowest = e.scalar(float(np.finfo(numpy_type(how.dtype)).min), how.dtype)
    if how.bias:
        scores = e.op("Add", scores, how.bias)
        # A bias of -inf hides; one of the lowest number does not, where there is nothing else.
        shown = e.op("Not", e.op("Equal", scores, e.scalar(-math.inf, how.dtype)))
        seen = e.op("And", seen, shown) if seen else shown
    if seen:
        scores = e.op("Where", seen, scores, lowest)
    weights = _softmax(e, scores, how)
    if seen:
        weights = e.op("Where", seen, weights, e.scalar(0.0, how.dtype))
    return e.op("MatMul", weights, v)


def _softmax(e: Emitter, scores: str, how: Scores) -> str:
    if not how.sinks:
        return e.op("Softmax", scores, axis=-1)
    # One more column, which takes probability and is dropped.
    zero, one, last = e.ints(0), e.ints(1), e.ints(-1)
    column = e.op("Slice", scores, zero, one, last)
    column = e.op("Expand", how.sinks, e.op("Shape", column))
    wide = e.op("Softmax", e.op("Concat", scores, column, axis=-1), axis=-1)
    return e.op("Slice", wide, zero, last, last)


def repeat_heads(e: Emitter, x: str, shape: tuple[Size, ...], heads: Size) -> str:
    """[B, G, L, D] with each head repeated to make [B, H, L, D]."""
    batch, kv_heads, *rest = shape
    group = divide(heads, kv_heads)
    assert group is not None
    if group == 1:
        return x
    apart = e.op("Unsqueeze", x, e.ints(2))
    wide = e.op("Expand", apart, e.ints(1, 1, group, 1, 1))  # type: ignore[arg-type]
    # Not a view by sizes: the length may be one that only the value itself knows.
    ends = e.op("Shape", x, start=2)
    target = e.op("Concat", e.op("Shape", x, end=1), e.ints(heads), ends, axis=0)  # type: ignore[arg-type]
    return e.op("Reshape", wide, target)


def iota(e: Emitter, start: str, stop: str) -> str:
    """i64 from ``start`` to ``stop``, both i64[1]."""
    zero = e.ints(0)
    bounds = [e.op("Squeeze", bound, zero) for bound in (start, stop)]
    return e.op("Range", *bounds, e.scalar(1, DType.I64))


def visibility(e: Emitter, node: Node, distance: str) -> str:
    """Which keys are seen, from ``query position - key position``; '' when all are."""
    visible = ""
    if node.attr("causal"):
        visible = e.op("GreaterOrEqual", distance, e.scalar(0, DType.I64))
    window = node.attr("window")
    if isinstance(window, int):
        near = e.op("Less", distance, e.scalar(window, DType.I64))
        visible = e.op("And", visible, near) if visible else near
    return visible


def alibi_bias(e: Emitter, slopes: str, slopes_dtype: DType, distance: str, dtype: DType) -> str:
    """``slope · (key position - query position)``, [..., H, S, L], for distances [..., S, L]."""
    wide = e.op("Cast", slopes, to=ELEMENT_TYPES[dtype]) if slopes_dtype is not dtype else slopes
    columns = e.op("Unsqueeze", wide, e.ints(1, 2))
    back = e.op("Cast", e.op("Neg", distance), to=ELEMENT_TYPES[dtype])
    return e.op("Mul", columns, back)


def sink_column(e: Emitter, sinks: str, sinks_dtype: DType, dtype: DType) -> str:
    """Sinks [H] as [1, H, 1, 1]."""
    wide = e.op("Cast", sinks, to=ELEMENT_TYPES[dtype]) if sinks_dtype is not dtype else sinks
    return e.op("Unsqueeze", wide, e.ints(0, 2, 3))


def scale_of(node: Node) -> float:
    """The factor of the scores."""
    scale = node.attr("scale")
    assert isinstance(scale, int | float)
    return float(scale)


def softcap_of(node: Node) -> float | None:
    """The soft cap of the scores."""
    softcap = node.attr("softcap")
    return float(softcap) if isinstance(softcap, int | float) else None


def computes(node: Node) -> Refusal | None:
    """Attention computes in float32 at least."""
    if node.types[0].dtype in (DType.F32, DType.F64):
        return None
    return Refusal(f"attention in {node.types[0].dtype}")


def _attention(
    e: Emitter, node: Node, q: str, k: str, v: str, mask: str = "", sinks: str = "", alibi: str = ""
) -> str | Refusal:
    refusal = computes(node)
    if refusal:
        return refusal
    q_node, k_node, v_node = node.operands[:3]
    distance = e.once(("distance", q_node.shape[2], k_node.shape[2]), lambda: _distance(e, node))
    visible = visibility(e, node, distance)
    mask_node, sinks_node, alibi_node = (*node.args[3:], None, None, None)[:3]
    bias = ""
    if alibi_node is not None:
        bias = alibi_bias(e, alibi, alibi_node.dtype, distance, node.dtype)
    if mask_node is not None and mask_node.dtype is DType.BOOL:
        visible = e.op("And", visible, mask) if visible else mask
    elif mask_node is not None:
        bias = e.op("Add", bias, mask) if bias else mask
    column = sink_column(e, sinks, sinks_node.dtype, node.dtype) if sinks_node is not None else ""
    how = Scores(node.dtype, scale_of(node), softcap_of(node), visible, bias, column)
    heads = q_node.shape[1]
    keys = repeat_heads(e, k, k_node.shape, heads)
    return attend(e, q, keys, repeat_heads(e, v, v_node.shape, heads), how)


def _distance(e: Emitter, node: Node) -> str:
    """Query position - key position, i64[S, L]; the queries are the last S of the L positions."""
    queries, keys = node.operands[0].shape[2], node.operands[1].shape[2]
    total = e.size(keys)
    query_positions = iota(e, e.size(keys - queries), total)
    key_positions = iota(e, e.ints(0), total)
    return e.op("Sub", e.op("Unsqueeze", query_positions, e.ints(1)), key_positions)


CONVERTERS: dict[str, Converter] = {"attention": _attention}

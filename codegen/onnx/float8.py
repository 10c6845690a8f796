"""Products of e4m3 codes, weights' and activations', as Q/DQ: what runtimes with FP8 units fuse,
and others compute as it stands.

QuantizeLinear rounds by scales that are computed beside it, a token or a group of a token's columns
each. Those of ONNX are of an axis; so x is two-dimensional, a row a token.
"""

from __future__ import annotations

from functools import partial

from ...ir.build import make
from ...ir.dims import product
from ...ir.dtypes import DType
from ...ir.node import Node
from ..constants import is_constant
from . import quantized
from .emitter import ELEMENT_TYPES, STORED_TYPES, Converter, Emitter, Names, Refusal
from .qdq import blocked, scales_by_row
from .reductions import or_nan

LARGEST = 448.0
_E4M3, _F32 = STORED_TYPES[DType.F8E4M3], ELEMENT_TYPES[DType.F32]


def _quantize_rows(e: Emitter, node: Node, x: str, static: str = "") -> Names | Refusal:
    """Codes and scales of rows, or of groups of a row's columns."""
    if node.types[0].dtype is not DType.F8E4M3:
        found: Names | Refusal = quantized.CONVERTERS["quantize_rows"](e, node, x, static)
        return found
    source, group = node.operands[0], _int(node, "group")
    if source.dtype is DType.F64 or node.attr("tries") is not None:
        return Refusal("rows of float64, or scales that are searched for")
    width = source.shape[-1]
    assert isinstance(width, int)
    rows = _by_rows(e, _single(e, source, x), source)
    if static:
        scale = _single(e, node.operands[1], static)
        flat = e.op("Squeeze", scale, e.ints(0))
        scale = e.op("Expand", scale, e.shape((*source.shape[:-1], 1)))
        codes = e.op("QuantizeLinear", rows, flat, output_dtype=_E4M3)
    else:
        scales = _row_scales(e, rows, width, group)
        scale = scales if source.type.rank == 2 else e.view(scales, node.types[1].shape)
        flat = scales if group else e.op("Reshape", scales, e.ints(-1))
        codes = e.op("QuantizeLinear", rows, flat, output_dtype=_E4M3, **blocked(group))
    return (codes if source.type.rank == 2 else e.view(codes, source.shape)), scale


def _row_scales(e: Emitter, rows: str, width: int, group: int) -> str:
    """[R, groups] for rows [R, K]: by it the largest magnitude of a group has the largest code."""
    step = group or width
    edges = range(0, width, step)
    zero, axis = e.ints(-1), e.ints(1)
    parts = []
    for start in edges:
        part = rows
        if len(edges) > 1:
            part = e.op("Slice", rows, e.ints(start), e.ints(min(start + step, width)), axis)
        sizes = e.op("Abs", part)
        parts.append(or_nan(e, sizes, zero, 1, e.op("ReduceMax", sizes, zero, keepdims=1)))
    largest = e.op("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
    return quantized.scale_of(e, largest, LARGEST)


def scaled_linear(
    e: Emitter,
    node: Node,
    xq: str,
    xs: str,
    wq: str,
    ws: str,
    bias: str = "",
    *,
    packs: bool = False,
) -> Names | Refusal:
    """A product of codes; of e4m3 as one of two DequantizeLinear. A 16-bit result is computed in
    float32, and rounded.
    """
    codes, x_scale, weight, scale = node.operands[:4]
    bias = _single(e, node.args[4], bias) if node.args[4] is not None else ""
    if codes.dtype is not DType.F8E4M3:
        scales = {name: node.attr(name) for name in ("rows", "group")}
        wide = node
        if node.dtype in (DType.F16, DType.BF16):
            wide = make("scaled_linear", *node.args[:4], dtype=DType.F32, **scales)
        found = quantized.scaled_linear(e, wide, xq, xs, wq, ws, bias, packs=packs)
        return found if isinstance(found, Refusal) else _rounded(e, node, found)
    if not (is_constant(weight) and is_constant(scale)):
        return Refusal("a product of codes that are computed")
    if DType.F64 in (node.dtype, x_scale.dtype):
        return Refusal("a product in float64")
    group, rows, count = _int(node, "group"), _int(node, "rows"), weight.shape[0]
    assert isinstance(count, int)
    flat = _by_rows(e, xq, codes)
    if x_scale.shape == (1,):
        by_row = e.op("Squeeze", _single(e, x_scale, xs), e.ints(0))
        x = e.op("DequantizeLinear", flat, by_row)
    else:
        by_row = _by_rows(e, xs, x_scale) if group else e.op("Reshape", xs, e.ints(-1))
        x = e.op("DequantizeLinear", flat, by_row, **blocked(group))
    of_rows = e.fold(scales_by_row(scale, count, rows, group))
    numbers = e.op("DequantizeLinear", e.fold(weight), of_rows, **blocked(group))
    out = _rounded(e, node, e.op("Gemm", x, numbers, bias, transB=1))
    return out if codes.type.rank == 2 else e.view(out, node.shape)


def _by_rows(e: Emitter, x: str, node: Node) -> str:
    """[..., K] as [R, K]; no Reshape that says nothing stands between Q and DQ."""
    if node.type.rank == 2:
        return x
    return e.view(x, (product(node.shape[:-1]), node.shape[-1]))


def _rounded(e: Emitter, node: Node, x: str) -> str:
    return x if node.dtype is DType.F32 else e.op("Cast", x, to=ELEMENT_TYPES[node.dtype])


def _single(e: Emitter, node: Node, x: str) -> str:
    return x if node.dtype is DType.F32 else e.op("Cast", x, to=_F32)


def _int(node: Node, name: str) -> int:
    value = node.attr(name)
    assert isinstance(value, int)
    return value


CONVERTERS: dict[str, Converter] = {
    "quantize_rows": _quantize_rows,
    "scaled_linear": scaled_linear,
}
PACKING: dict[str, Converter] = {
    **CONVERTERS,
    "scaled_linear": partial(scaled_linear, packs=True),
}
"""As ``CONVERTERS``, products of int8 by MatMulNBits."""

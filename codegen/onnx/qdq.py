"""Products of weights in codes by DequantizeLinear, which any ONNX runtime has: int8, e4m3 and 4
bits, by rows, blocks of rows, or groups of columns.
"""

from __future__ import annotations

from math import prod
from typing import Any

from ...ir.build import cast, const, make, reshape
from ...ir.dtypes import DType
from ...ir.node import Node
from ...ir.ops.quant import blocks
from ..constants import is_constant
from .contractions import CONVERTERS as CONTRACTIONS
from .contractions import dense_linear
from .emitter import ELEMENT_TYPES, Emitter, Names, Refusal
from .quantized import MIDDLE, unpackable


def linear(
    e: Emitter, node: Node, x: str, weight: str, bias: str = "", *, packs: bool = False
) -> Names | Refusal:
    """``linear`` over numbers, or over codes with a DequantizeLinear before it; with ``packs`` by
    MatMulNBits where that takes the codes.
    """
    codes = node.operands[1]
    in_codes = codes.op == "dequantize" and is_constant(codes)
    if not in_codes or (packs and not unpackable(node, codes)):
        return CONTRACTIONS["linear"](e, node, x, weight, bias)
    reason = _unfit(codes)
    if reason:
        return Refusal(f"a weight of {codes.operands[0].dtype} codes, {reason}")
    return dense_linear(e, node, x, _dequantized(e, codes), bias)


def _unfit(weight: Node) -> str:
    """Why DequantizeLinear of opset 24 cannot say what a weight is; '' where it can."""
    q, _, zero = (*weight.args, None)[:3]
    group, width = weight.attr("group"), weight.shape[1]
    assert q is not None and isinstance(group, int) and isinstance(width, int)
    if q.dtype not in (DType.U8, DType.I8, DType.F8E4M3):
        return "which are neither int8, e4m3 nor 4 bits"
    if weight.dtype not in (DType.F32, DType.F16, DType.BF16):
        return f"whose numbers are {weight.dtype}"
    if weight.attr("rows") != 1 and (zero is not None or q.dtype is DType.U8):
        return "with scales that cover several rows"
    if zero is not None and zero.dtype is not q.dtype:
        return "with zero points between the codes"
    if q.dtype is DType.U8 and ((group and width % group) or width % 2):
        return f"whose {width} columns end within a group or a byte"
    return ""


def _dequantized(e: Emitter, weight: Node) -> str:
    """The weight [N, K] from its codes, scales and zero points: computed in float32, as the IR
    does, and rounded to the weight's own type.
    """
    found = _in_float32(e, weight)
    if weight.dtype is DType.F32:
        return found
    return e.op("Cast", found, to=ELEMENT_TYPES[weight.dtype])


def _in_float32(e: Emitter, weight: Node) -> str:
    q, scale, zero = (*weight.args, None)[:3]
    assert q is not None and scale is not None
    group, rows, (count, width) = weight.attr("group"), weight.attr("rows"), weight.shape
    assert isinstance(group, int) and isinstance(rows, int)
    assert isinstance(count, int) and isinstance(width, int)
    scales = e.fold(scales_by_row(scale, count, rows, group))
    attrs = blocked(group)
    shape = (count, blocks(width, group)) if group else (count,)
    if q.dtype is not DType.U8:
        zeros = "" if zero is None else e.fold(reshape(zero, *shape))
        return e.op("DequantizeLinear", e.fold(q), scales, zeros, **attrs)
    packed = e.fold_four_bits(q, (count, width))
    zeros = e.fold_four_bits(_zeros(zero, prod(shape)), shape)
    return e.op("DequantizeLinear", packed, scales, zeros, **attrs)


def scales_by_row(scale: Node, count: int, rows: int, group: int) -> Node:
    """Scales by blocks of ``rows`` rows (0: all) as float32 of each of ``count`` rows: [N], or with
    groups [N, groups].
    """
    number, groups = scale.shape
    assert isinstance(number, int) and isinstance(groups, int)
    wide = cast(scale, DType.F32)
    if rows != 1:
        each = rows or count
        spread = make("expand", reshape(wide, number, 1, groups), shape=(number, each, groups))
        wide = reshape(spread, number * each, groups)
        if number * each > count:  # the last block is shorter
            wide = make("slice", wide, dim=0, start=0, stop=count)
    return wide if group else reshape(wide, count)


def blocked(group: int) -> dict[str, Any]:
    """How Quantize- and DequantizeLinear take scales by rows, or by groups of columns."""
    return {"axis": 1, "block_size": group} if group else {"axis": 0}


def _zeros(zero: Node | None, number: int) -> Node:
    """So many zero points, two a byte; those that are not given are ``MIDDLE``."""
    size = -(-number // 2)
    if zero is None:
        return make("expand", const(17 * MIDDLE, DType.U8), shape=(size,))
    flat = reshape(zero, number)
    if number % 2:
        flat = make("pad", flat, pads=((0, 1),), value=0)
    pairs = reshape(flat, size, 2)
    low, high = (reshape(make("slice", pairs, dim=1, start=i, stop=i + 1), size) for i in (0, 1))
    return make("add", low, make("mul", high, const(16, DType.U8)))

"""Products of quantized weights as ONNX: MatMulNBits over packed codes, MatMulInteger over int8.

Where MatMulNBits computes in int8, a NaN in x is lost: the codes it rounds to have none.
"""

from __future__ import annotations

from math import gcd

from ...ir.build import cast, const, make, permute, reshape
from ...ir.dtypes import DType
from ...ir.node import Node
from ..constants import is_constant
from .emitter import ELEMENT_TYPES, MICROSOFT, Converter, Emitter, Refusal
from .reductions import or_nan

# What ONNX Runtime has kernels for; other blocks it expands at each call.
LEAST_BLOCK, LARGEST_BLOCK = 16, 256
INT8_COMPUTE = 4  # accuracy_level: x is rounded to int8, by the blocks of the weight
ZERO_BYTE = 0x88  # two 4-bit codes of 8
MIDDLE = 8  # the code that stands for 0 where there are no zero points
ZERO_CODE = 128  # an int8 code of 0, as MatMulNBits has them


def packed_linear(e: Emitter, node: Node, x: str, bias: str) -> str | None:
    """``linear(x, dequantize(q, …))`` with the codes packed as they are; None where the weight is
    no such, or one that MatMulNBits cannot take, which a note tells.
    """
    weight = node.operands[1]
    if weight.op != "dequantize" or not is_constant(weight):
        return None
    reason = unpackable(node, weight)
    if reason:
        e.note(f"a weight of {weight.operands[0].dtype} codes is expanded to floats: {reason}")
        return None
    q, scale, zero = (*weight.args, None)[:3]
    assert q is not None and scale is not None
    group = weight.attr("group")
    assert isinstance(group, int)
    level = INT8_COMPUTE if weight.attr("compute") is DType.I8 else 0
    whole = zero is None or (zero.dtype is DType.U8 and q.dtype is DType.U8)
    width = _width(weight)
    found = blocked_linear(e, x, bias, q, scale, zero if whole else None, width, group, level)
    if whole:
        return found
    assert zero is not None
    return _between_codes(e, node, x, found, (scale, zero), MIDDLE if q.dtype is DType.U8 else 0)


def _between_codes(
    e: Emitter, node: Node, x: str, product: str, parts: tuple[Node, Node], middle: int
) -> str:
    """``product``, which took ``middle`` for all zero points, with those that the groups have.

    A weight is ``scale (q - zero) = scale (q - middle) + scale (middle - zero)``, whose second part
    is one number a group: it meets the sum of x over the group. MatMulNBits takes zero points that
    are whole numbers; with any others it expands the weight at each call.
    """
    scale, zero = (cast(part, DType.F32) for part in parts)
    moved = make("mul", scale, make("sub", const(float(middle), DType.F32), zero))
    weight = node.operands[1]
    group, width, groups = weight.attr("group"), _width(weight), moved.shape[1]
    assert isinstance(group, int) and isinstance(groups, int)
    sums = e.once(("sums", x, group), lambda: _sums(e, node, x, width, group, groups))
    if node.operands[0].type.rank == 2:
        return e.op("Gemm", sums, e.fold(moved), product, transB=1)
    return e.op("Add", product, e.op("MatMul", sums, e.fold(permute(moved, 1, 0))))


def _sums(e: Emitter, node: Node, x: str, width: int, group: int, groups: int) -> str:
    """The sum of each group of columns: x [..., K] -> [..., groups]."""
    size = group or width
    if missing := groups * size - width:
        pads = e.ints(*(0 for _ in range(2 * node.operands[0].type.rank - 1)), missing)
        x = e.op("Pad", x, pads)
    shape = (*node.operands[0].shape[:-1], groups, size)
    return e.op("ReduceSum", e.view(x, shape), e.ints(-1), keepdims=0)


def _width(weight: Node) -> int:
    width = weight.shape[1]
    assert isinstance(width, int)
    return width


def unpackable(node: Node, weight: Node) -> str:
    """Why MatMulNBits cannot take a dequantized weight, or should not; '' where it can."""
    q, _, zero = (*weight.args, None)[:3]
    group = weight.attr("group")
    assert q is not None and isinstance(group, int)
    if any(n.dtype is not DType.F32 for n in (node, node.operands[0], weight)):
        return "the product is not in float32"
    if q.dtype not in (DType.U8, DType.I8):
        return "there is no kernel for such codes"
    if q.dtype is DType.I8 and weight.attr("compute") is None:
        return "only products that compute in int8 are faster (QuantConfig.compute)"
    if weight.attr("rows") != 1:
        return "its scales cover several rows"
    if group and gcd(group, LARGEST_BLOCK) < LEAST_BLOCK:
        return f"groups of {group} are no multiple of {LEAST_BLOCK}"
    return ""


def blocked_linear(
    e: Emitter,
    x: str,
    bias: str,
    q: Node,
    scale: Node,
    zero: Node | None,
    width: int,
    group: int,
    level: int,
) -> str:
    """``x · dequantize(q, scale, zero)ᵀ``, by blocks of ``block_of(width, group)`` columns; zero
    points, if any, in u8 and for 4-bit codes.
    """
    block = block_of(width, group)
    count = q.shape[0]
    assert isinstance(count, int)
    four = q.dtype is DType.U8
    parts = [x, e.fold(_packed(q, width, block)), e.fold(_by_block(scale, width, group, block))]
    if zero is not None:
        parts.append(e.fold(nibbles(_by_block(zero, width, group, block))))
    elif bias:
        parts.append("")
    if bias:
        parts += ["", bias]
    return e.op(
        "MatMulNBits",
        *parts,
        domain=MICROSOFT,
        K=width,
        N=count,
        bits=4 if four else 8,
        block_size=block,
        accuracy_level=level,
    )


def block_of(width: int, group: int) -> int:
    """The block size for groups of columns. Rows with one scale have the largest that fills them
    up least.
    """
    if group:
        return gcd(group, LARGEST_BLOCK)
    sizes = [LARGEST_BLOCK >> i for i in range(4)]  # 256 … 32
    return min(sizes, key=lambda size: -width % size)


def _packed(q: Node, width: int, block: int) -> Node:
    """The codes u8[N, blocks, bytes], the last block filled up with zeros."""
    count, stored = q.shape
    assert isinstance(count, int) and isinstance(stored, int)
    four = q.dtype is DType.U8
    number = -(-width // block)
    across = block // 2 if four else block
    filler = ZERO_BYTE
    if not four:
        wide = make("add", cast(q, DType.I16), const(ZERO_CODE, DType.I16))
        q, filler = cast(wide, DType.U8), ZERO_CODE
    return reshape(_resized(q, number * across, filler), count, number, across)


def _resized(x: Node, columns: int, filler: int) -> Node:
    """``x`` [N, K] with so many columns."""
    have = x.shape[1]
    assert isinstance(have, int)
    if have > columns:
        return make("slice", x, dim=1, start=0, stop=columns)
    return (
        x if have == columns else make("pad", x, pads=((0, 0), (0, columns - have)), value=filler)
    )


def _by_block(part: Node, width: int, group: int, block: int) -> Node:
    """A part of each group [N, groups] as one of each block; scales in float32."""
    count, groups = part.shape
    assert isinstance(count, int) and isinstance(groups, int)
    number = -(-width // block)
    each = group // block if group else number
    part = part if part.dtype is DType.U8 else cast(part, DType.F32)
    if each > 1:
        wide = make("expand", reshape(part, count, groups, 1), shape=(count, groups, each))
        part = reshape(wide, count, groups * each)
    return _resized(part, number, 0)


def nibbles(zero: Node) -> Node:
    """Zero points u8[N, blocks], two a byte."""
    count, number = zero.shape
    assert isinstance(count, int) and isinstance(number, int)
    pairs = reshape(_resized(zero, number + number % 2, 0), count, -(-number // 2), 2)
    low, high = (
        reshape(make("slice", pairs, dim=2, start=i, stop=i + 1), count, -(-number // 2))
        for i in (0, 1)
    )
    return make("add", low, make("mul", high, const(16, DType.U8)))


def _quantize_rows(e: Emitter, node: Node, x: str, static: str = "") -> tuple[str, str] | Refusal:
    """Codes and scale of each row by itself: DynamicQuantizeLinear would mix the rows."""
    if node.types[0].dtype is not DType.I8 or node.attr("group"):
        return Refusal("codes other than int8 by rows")
    source = node.operands[0]
    if source.dtype is DType.F64 or (static and node.operands[1].dtype is DType.F64):
        return Refusal("rows of float64")
    single = ELEMENT_TYPES[DType.F32]
    wide = x if source.dtype is DType.F32 else e.op("Cast", x, to=single)
    if static:
        divisor = static if node.operands[1].dtype is DType.F32 else e.op("Cast", static, to=single)
        scale = e.op("Expand", divisor, e.shape((*source.shape[:-1], 1)))
    else:
        sizes, axes = e.op("Abs", wide), e.ints(-1)
        largest = or_nan(e, sizes, axes, 1, e.op("ReduceMax", sizes, axes, keepdims=1))
        scale = divisor = scale_of(e, largest, 127.0)
    steps = e.op("Round", e.op("Div", wide, divisor))
    steps = e.op("Clip", steps, e.scalar(-127.0, DType.F32), e.scalar(127.0, DType.F32))
    # A NaN has no code; its row's scale tells.
    known = e.op("Where", e.op("IsNaN", steps), e.scalar(0.0, DType.F32), steps)
    return e.op("Cast", known, to=ELEMENT_TYPES[DType.I8]), scale


def scale_of(e: Emitter, largest: str, code: float) -> str:
    """Scales f32 by which magnitudes f32 have the largest code; 1 where all is 0."""
    scale = e.op("Div", largest, e.scalar(code, DType.F32))
    empty = e.op("Equal", scale, e.scalar(0.0, DType.F32))
    return e.op("Where", empty, e.scalar(1.0, DType.F32), scale)


def scaled_linear(
    e: Emitter,
    node: Node,
    xq: str,
    xs: str,
    wq: str,
    ws: str,
    bias: str = "",
    *,
    packs: bool = True,
) -> str | Refusal:
    """A product of codes: by MatMulNBits where it ``packs`` and can, else by MatMulInteger."""
    codes, x_scale, weight, scale = node.operands[:4]
    if codes.dtype is not DType.I8 or node.attr("group") or node.attr("rows") not in (0, 1):
        return Refusal("codes other than int8 by rows or tensors")
    if any(n.dtype is not DType.F32 for n in (node, x_scale, scale)):
        return Refusal("scales or a result other than float32")
    x = _before_rounding(codes)
    if (
        packs
        and x is not None
        and e.at_hand(x)
        and node.attr("rows") == 1
        and is_constant(weight)
        and is_constant(scale)
    ):
        width = weight.shape[1]
        assert isinstance(width, int)
        return blocked_linear(
            e, e.value(x), bias, weight, scale, None, width, 0, level=INT8_COMPUTE
        )
    if is_constant(weight):
        turned = e.fold(permute(weight, 1, 0))
    else:
        turned = e.op("Transpose", wq, perm=[1, 0])
    sums = e.op("Cast", e.op("MatMulInteger", xq, turned), to=ELEMENT_TYPES[DType.F32])
    by_row = e.op("Reshape", ws, e.ints(-1))
    result = e.op("Mul", e.op("Mul", sums, xs), by_row)
    return e.op("Add", result, bias) if bias else result


def _before_rounding(codes: Node) -> Node | None:
    """What the rows of codes are rounded from, by scales of their own.

    MatMulNBits rounds it itself, by blocks of a row: closer than whole rows, and 3 to 30 times as
    fast as MatMulInteger.
    """
    rows = codes.operands[0] if codes.op == "item" else None
    if rows is None or rows.op != "quantize_rows" or rows.args[1] is not None:
        return None
    x = rows.operands[0]
    return x if x.dtype is DType.F32 else None


CONVERTERS: dict[str, Converter] = {
    "quantize_rows": _quantize_rows,
    "scaled_linear": scaled_linear,
}

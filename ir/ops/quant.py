"""Quantized weights and rows: how codes become numbers, rows codes, and products of both.

Codes are int8, float8 (e4m3), or 4 bits: two of them a byte (u8), the even column in the low half.
A scale covers a block of ``rows`` x ``group`` codes, each 0 for "all of them": [1, 1] a whole
tensor, [N, 1] rows (``rows=1, group=0``), [N, ceil(K / group)] groups, [ceil(N / 128),
ceil(K / 128)] blocks. The last block of an axis may be shorter.

Scales of rows are float32, of float64 rows float64. By the least that a row can have, the largest
code stands for its largest magnitude. ``quantize_rows(…, tries=n)`` tries n scales from there up to
the double, and takes the one with the least squared error: a float's grid is no multiple of itself
within an octave, so another scale may suit a row better.

``dequantize(…, compute=i8)`` lets a product with the weight round its other operand to int8, by
rows and groups of columns, where that is faster. The value is the same.
"""

from __future__ import annotations

import torch

from ..dims import Size
from ..dtypes import DType
from ..node import Attr, Node
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType, TupleType

LARGEST = {DType.I8: 127.0, DType.F8E4M3: 448.0}
"""The largest code of each element type that rows are quantized to; the least is its negative."""
MOST_TRIES = 64
"""Of scales of a row."""
MIDDLE = 8
"""The 4-bit code of 0 where no zero points are given."""


def blocks(size: int, block: int) -> int:
    """How many blocks an axis has; a ``block`` of 0 is the whole axis."""
    return 1 if block == 0 else -(-size // block)


def packed_width(width: int, group: int) -> int:
    """Bytes of a row of ``width`` 4-bit codes, whose last group is filled up."""
    stored = blocks(width, group) * (group or width)
    return -(-stored // 2)


def _fixed(op: str, type_: TensorType) -> tuple[int, int]:
    sizes = [size for size in type_.shape if isinstance(size, int)]
    if len(sizes) != 2 or type_.rank != 2:
        raise ill_typed(op, "a weight of two static sizes", type_)
    return sizes[0], sizes[1]


def _dequantize_type(
    q: TensorType,
    scale: TensorType,
    zero: TensorType | None = None,
    *,
    dtype: DType,
    rows: int = 1,
    group: int = 0,
    width: int | None = None,
    compute: DType | None = None,
) -> TensorType:
    count, stored = _fixed("dequantize", q)
    columns = stored if width is None else width
    packed = q.dtype is DType.U8
    if packed != (width is not None) or (packed and stored != packed_width(columns, group)):
        raise ill_typed("dequantize", "width K for 4-bit codes u8[N, K / 2] and for these only", q)
    if q.dtype not in (DType.U8, *LARGEST) or (packed and group % 2):
        raise ill_typed("dequantize", "codes i8, f8e4m3, or u8 (packed, an even group)", q)
    if scale.shape != (blocks(count, rows), blocks(columns, group)):
        raise ill_typed("dequantize", f"scales by {rows} rows, {group} columns", q, scale)
    if zero is not None and zero.shape != scale.shape:
        raise ill_typed("dequantize", "a zero point for each scale", q, scale, zero)
    if not all(t.is_float and not t.is_float8 for t in (scale.dtype, dtype)):
        raise ill_typed("dequantize", f"scales and a result in floats, not {dtype}", scale)
    if compute not in (None, DType.I8):
        raise ill_typed("dequantize", f"products computed in i8, not {compute}", q)
    return TensorType(dtype, (count, columns))


def unpack4(packed: torch.Tensor) -> torch.Tensor:
    """u8[N, W] -> u8[N, 2 W], the low half of a byte first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def spread(scale: torch.Tensor, shape: tuple[int, int], rows: int, group: int) -> torch.Tensor:
    """The scale of each of [N, K] codes; an axis that all share stays 1."""
    for axis, block in ((0, rows), (1, group)):
        if block > 1:
            scale = scale.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
    return scale


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    dtype: DType,
    rows: int = 1,
    group: int = 0,
    width: int | None = None,
    compute: DType | None = None,
) -> torch.Tensor:
    wide = _wide(q, scale)
    codes = q.to(wide) if width is None else unpack4(q)[:, :width].to(wide)
    shape = (codes.shape[0], codes.shape[1])
    if zero is not None:
        codes = codes - spread(zero.to(wide), shape, rows, group)
    elif width is not None:
        codes = codes - MIDDLE
    return (codes * spread(scale.to(wide), shape, rows, group)).to(dtype.torch)


def _quantize_rows_type(
    x: TensorType,
    static_scale: TensorType | None = None,
    *,
    dtype: DType,
    group: int = 0,
    tries: int | None = None,
) -> TupleType:
    width = x.shape[-1] if x.rank else None
    if not isinstance(width, int) or not x.dtype.is_float or x.dtype.is_float8:
        raise ill_typed("quantize_rows", "floats [..., K] of a static K", x)
    if dtype not in LARGEST:
        raise ill_typed("quantize_rows", f"i8 or f8e4m3, not {dtype}", x)
    if static_scale is not None:
        fits = static_scale.shape == (1,) and static_scale.dtype.is_float
        if not fits or group or static_scale.dtype.is_float8:
            raise ill_typed("quantize_rows", "one static scale [1], no groups", x, static_scale)
    if tries is not None:
        whole = dtype is DType.F8E4M3 and static_scale is None and not group
        if not whole or not 1 <= tries <= MOST_TRIES:
            wanted = f"1 to {MOST_TRIES} tries, of whole rows to f8e4m3 without a static scale"
            raise ill_typed("quantize_rows", f"{wanted}, not {tries}", x)
    scales = (*x.shape[:-1], blocks(width, group))
    return x.with_dtype(dtype), TensorType(DType.F64 if x.dtype is DType.F64 else DType.F32, scales)


def _quantize_rows(
    x: torch.Tensor,
    static_scale: torch.Tensor | None = None,
    *,
    dtype: DType,
    group: int = 0,
    tries: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide, largest = x.to(_wide(x)), LARGEST[dtype]
    if tries is not None:
        return _nearest_rows(wide, tries)
    if static_scale is not None:
        scale = static_scale.to(wide.dtype).expand(*x.shape[:-1], 1)
    else:
        parts = wide.split(group or max(x.shape[-1], 1), -1)
        scale = torch.stack([part.abs().amax(-1) for part in parts], -1).div(largest)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    by_column = scale.repeat_interleave(group, -1)[..., : x.shape[-1]] if group else scale
    codes = (wide / by_column).clamp(-largest, largest)
    if dtype is DType.I8:
        # A NaN has no code. Its row's scale is NaN, and so is every product with it.
        codes = codes.round().nan_to_num(0.0)
    return codes.to(dtype.torch), scale.contiguous()


def tried_scales(tries: int) -> tuple[tuple[float, float], ...]:
    """What the least scale of a row is multiplied with, ``2 ** (j / tries)``, and the inverses.

    Both have 16 bits behind the point. So the product of a factor and a code is exact in float32,
    and float64 has the same numbers.
    """
    exponents = [j / tries for j in range(tries)]
    return tuple((_short(2.0**e), _short(2.0**-e)) for e in exponents)


def _short(value: float) -> float:
    return round(value * 65536) / 65536


def error_unit(width: int) -> float:
    """How many units of its error a square of 1, in steps of the least scale, is: a power of two
    by which the errors of ``width`` codes of e4m3, below 32 steps each, add up within 31 bits.
    """
    return 2.0 ** (21 - (width - 1).bit_length())


def _nearest_rows(x: torch.Tensor, tries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale of the best try, the first of the best.

    Squares are whole units, cut off, and their sums exact: whoever computes them, in whatever
    order, makes the same choice.
    """
    largest, unit = LARGEST[DType.F8E4M3], error_unit(x.shape[-1])
    least = x.abs().amax(-1, keepdim=True).div(largest)
    least = torch.where(least == 0, torch.ones_like(least), least)
    steps = (x / least).clamp(-largest, largest)
    codes = steps.to(torch.float8_e4m3fn)
    best, fewest = torch.ones_like(least), torch.full_like(least, torch.inf)
    for factor, inverse in tried_scales(tries):
        tried = (steps * inverse).to(codes.dtype)
        off = steps - tried.to(x.dtype) * factor
        # A NaN counts for nothing; the scale of its row is NaN.
        error = (off * off * unit).nan_to_num(0.0).to(torch.int64).sum(-1, keepdim=True)
        nearer = error < fewest
        fewest = torch.where(nearer, error.double(), fewest)
        best = torch.where(nearer, factor, best)
        codes = torch.where(nearer, tried.view(torch.uint8), codes.view(torch.uint8))
        codes = codes.view(tried.dtype)
    return codes, least * best


def _scaled_linear_type(
    xq: TensorType,
    xs: TensorType,
    wq: TensorType,
    ws: TensorType,
    bias: TensorType | None = None,
    *,
    dtype: DType,
    rows: int = 1,
    group: int = 0,
) -> TensorType:
    count, width = _fixed("scaled_linear", wq)
    if xq.dtype is not wq.dtype or xq.dtype not in LARGEST or xq.shape[-1:] != (width,):
        raise ill_typed("scaled_linear", "codes [..., K] and [N, K], both i8 or f8e4m3", xq, wq)
    of_rows = (*xq.shape[:-1], blocks(width, group))
    if xs.shape != of_rows and (xs.shape != (1,) or group):
        raise ill_typed("scaled_linear", f"x's scales {list(of_rows)}, or [1]", xq, xs)
    if ws.shape != (blocks(count, rows), blocks(width, group)):
        raise ill_typed("scaled_linear", f"scales by {rows} rows, {group} columns", wq, ws)
    floats = (xs.dtype, ws.dtype, dtype)
    if not all(t.is_float and not t.is_float8 for t in floats):
        raise ill_typed("scaled_linear", f"scales and a result in floats, not {dtype}", xs, ws)
    if bias is not None and (bias.shape != (count,) or bias.dtype is not dtype):
        raise ill_typed("scaled_linear", f"bias [N] of {dtype}", wq, bias)
    return TensorType(dtype, (*xq.shape[:-1], count))


def _scaled_linear(
    xq: torch.Tensor,
    xs: torch.Tensor,
    wq: torch.Tensor,
    ws: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: DType,
    rows: int = 1,
    group: int = 0,
) -> torch.Tensor:
    # Sums of products of int8 are exact in float64, as they are in int32, and much faster.
    wide = torch.float64 if xq.dtype == torch.int8 else _wide(xq, xs)
    step = group or max(wq.shape[1], 1)
    total = xq.new_zeros(*xq.shape[:-1], wq.shape[0], dtype=wide)
    for index, (x, w) in enumerate(zip(xq.split(step, -1), wq.split(step, -1), strict=True)):
        of_rows = ws[:, index].to(wide)
        if rows != 1:
            of_rows = of_rows.repeat_interleave(rows or wq.shape[0])[: wq.shape[0]]
        of_x = xs.to(wide) if xs.shape == (1,) else xs[..., index, None].to(wide)
        total += torch.nn.functional.linear(x.to(wide), w.to(wide)) * of_x * of_rows
    return (total if bias is None else total + bias.to(wide)).to(dtype.torch)


def _product_flops(node: Node) -> Size:
    return node.type.numel * node.operands[0].shape[-1] * 2


def rounding_flops(tries: Attr) -> int:
    """Of an element that becomes a code."""
    return 3 if tries is None else 3 + 6 * int(str(tries))


def _row_flops(node: Node) -> Size:
    return node.types[0].numel * rounding_flops(node.attr("tries"))


def _codes(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=dtype)
    return (torch.randn(shape, generator=generator) * 60).to(dtype)


def _scales(generator: torch.Generator, *shape: int) -> torch.Tensor:
    # Powers of two, which stay as they are in every element type.
    return torch.randint(-6, -2, shape, generator=generator).double().exp2()


def _dequantize_samples(g: torch.Generator) -> list[Sample]:
    i8, f8, u8 = torch.int8, torch.float8_e4m3fn, torch.uint8
    zeros = torch.randint(0, 16, (5, 2), generator=g, dtype=u8)
    four: dict[str, Attr] = {"dtype": DType.F32, "group": 8, "width": 13}
    return [
        Sample((_codes(g, i8, 5, 12), _scales(g, 5, 1)), {"dtype": DType.F32}),
        Sample((_codes(g, f8, 5, 12), _scales(g, 1, 1)), {"dtype": DType.F32, "rows": 0}),
        Sample(
            (_codes(g, f8, 5, 12), _scales(g, 2, 2)), {"dtype": DType.F32, "rows": 4, "group": 8}
        ),
        Sample((_codes(g, u8, 5, 8), _scales(g, 5, 2)), four),
        Sample((_codes(g, u8, 5, 8), _scales(g, 5, 2), zeros), four),
    ]


def _row_samples(g: torch.Generator) -> list[Sample]:
    x = torch.randn(3, 12, generator=g, dtype=torch.float64)
    static = torch.tensor([0.25], dtype=torch.float64)
    return [
        Sample((x,), {"dtype": DType.I8}),
        Sample((x,), {"dtype": DType.F8E4M3, "group": 8}),
        Sample((x, static), {"dtype": DType.F8E4M3}),
        Sample((x,), {"dtype": DType.F8E4M3, "tries": 8}),
    ]


def _product_samples(g: torch.Generator) -> list[Sample]:
    i8, f8 = torch.int8, torch.float8_e4m3fn
    bias = torch.randint(-8, 8, (5,), generator=g).float()
    block: dict[str, Attr] = {"dtype": DType.F32, "rows": 4, "group": 8}
    return [
        Sample(
            (_codes(g, i8, 3, 12), _scales(g, 3, 1), _codes(g, i8, 5, 12), _scales(g, 5, 1)),
            {"dtype": DType.F32},
        ),
        Sample(
            (_codes(g, f8, 3, 12), _scales(g, 1), _codes(g, f8, 5, 12), _scales(g, 1, 1), bias),
            {"dtype": DType.F32, "rows": 0},
        ),
        Sample(
            (_codes(g, f8, 3, 12), _scales(g, 3, 2), _codes(g, f8, 5, 12), _scales(g, 2, 2)), block
        ),
    ]


DEQUANTIZE = register(
    OpSchema(
        "dequantize",
        ("q", "scale", "zero?"),
        _dequantize_type,
        _dequantize,
        ("dtype", "rows", "group", "width", "compute"),
        lambda node: node.type.numel * 2,
        _dequantize_samples,
    )
)
QUANTIZE_ROWS = register(
    OpSchema(
        "quantize_rows",
        ("x", "static_scale?"),
        _quantize_rows_type,
        _quantize_rows,
        ("dtype", "group", "tries"),
        _row_flops,
        _row_samples,
    )
)
SCALED_LINEAR = register(
    OpSchema(
        "scaled_linear",
        ("xq", "xs", "wq", "ws", "bias?"),
        _scaled_linear_type,
        _scaled_linear,
        ("dtype", "rows", "group"),
        _product_flops,
        _product_samples,
    )
)

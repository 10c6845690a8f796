"""Round-to-nearest quantization of weights [N, K], as operations of the weight grammar.

Codes are int8, float8_e4m3fn, or 4 bits, one a byte (uint8) until `pack_codes` puts two into one.
A scale covers a block of `rows` x `group` weights, where 0 stands for all of them; the last block
of an axis may be shorter. Blocks of zeros have the scale 1, and give zeros. A weight that is NaN or
infinite has no code: evaluation raises `NotFiniteError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

LARGEST: Mapping[torch.dtype, float] = {
    torch.int8: 127.0,
    torch.float8_e4m3fn: 448.0,
    torch.uint8: 7.5,  # the codes 0 … 15, of which 8 is zero: half of the way between the ends
}
"""The magnitude, in steps, that the largest weight of a block is scaled to."""
LEVELS = 15  # steps from the least 4-bit code to the greatest
MIDDLE = 8  # the 4-bit code of zero, where there are no zero points

Result = tuple[tuple[int, ...], torch.dtype]


class NotFiniteError(ValueError):
    """A weight to be quantized that holds NaN or an infinity."""


def blocks(size: int, block: int) -> int:
    """How many blocks an axis has; a block of 0 is the whole axis."""
    return 1 if block == 0 else -(-size // block)


def block_extremes(x: Tensor, rows: int, group: int) -> tuple[Tensor, Tensor]:
    """The least and greatest number of each block, float32 [blocks of rows, blocks of columns]."""
    wide = _finite(x)
    count, width = wide.shape
    high, across = rows or count, group or width
    pads = (0, -width % across, 0, -count % high)
    low = torch.nn.functional.pad(wide, pads, value=float("inf"))
    high_end = torch.nn.functional.pad(wide, pads, value=float("-inf"))
    shape = (blocks(count, rows), high, blocks(width, group), across)
    return low.view(shape).amin((1, 3)), high_end.view(shape).amax((1, 3))


def _finite(x: Tensor) -> Tensor:
    wide = x.float()
    if not bool(torch.isfinite(wide).all()):
        raise NotFiniteError("NaN or an infinity")
    return wide


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _quantize_scale(x: Tensor, *, dtype: torch.dtype, rows: int, group: int) -> Tensor:
    least, greatest = block_extremes(x, rows, group)
    return _or_one(torch.maximum(-least, greatest) / _largest(dtype))


def _quantize_range(x: Tensor, *, group: int) -> Tensor:
    """Scales of codes with zero points: the range of each group, zero included, in steps."""
    least, greatest = block_extremes(x, 1, group)
    return _or_one((greatest.clamp(min=0) - least.clamp(max=0)) / LEVELS)


def _quantize_zero(x: Tensor, scale: Tensor, *, group: int) -> Tensor:
    least, _ = block_extremes(x, 1, group)
    return (-least.clamp(max=0) / scale.float()).round().clamp(0, LEVELS).to(torch.uint8)


def _quantize_codes(
    x: Tensor, scale: Tensor, *zero: Tensor, dtype: torch.dtype, rows: int, group: int
) -> Tensor:
    if len(zero) > 1:
        raise TypeError("more than one tensor of zero points")
    steps = _finite(x) / spread(scale.float(), x, rows, group)
    if dtype == torch.uint8:
        middle = spread(zero[0].float(), x, rows, group) if zero else MIDDLE
        return (steps.round() + middle).clamp(0, LEVELS).to(dtype)
    if zero:
        raise TypeError("zero points are for 4-bit codes")
    largest = _largest(dtype)
    steps = steps.clamp(-largest, largest)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype)


def _pack_codes(codes: Tensor, *, group: int) -> Tensor:
    """uint8 [N, K] of 4-bit codes -> [N, W]: even columns in the low halves of the bytes. The last
    group is filled up with codes of zero.
    """
    width = codes.shape[1]
    stored = 2 * packed_width(width, group)
    whole = torch.nn.functional.pad(codes, (0, stored - width), value=MIDDLE)
    return whole[:, ::2] | (whole[:, 1::2] << 4)


def packed_width(width: int, group: int) -> int:
    """Bytes of a row of packed 4-bit codes."""
    return -(-blocks(width, group) * (group or width) // 2)


def spread(scale: Tensor, x: Tensor, rows: int, group: int) -> Tensor:
    """The scale of each element of x [N, K]; an axis that all share stays 1."""
    for axis, block in ((0, rows), (1, group)):
        if block > 1:
            scale = scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return scale


def _largest(dtype: torch.dtype) -> float:
    if dtype not in LARGEST:
        raise TypeError(f"{dtype} is no type of codes")
    return LARGEST[dtype]


def _scale_result(
    x: Result, *, rows: int = 1, group: int, dtype: torch.dtype = torch.uint8
) -> Result:
    _largest(dtype)
    count, width = _matrix(x)
    return (blocks(count, rows), blocks(width, group)), torch.float32


def _zero_result(x: Result, scale: Result, *, group: int) -> Result:
    _fits(scale, _scale_result(x, group=group))
    return scale[0], torch.uint8


def _codes_result(
    x: Result, scale: Result, *zero: Result, dtype: torch.dtype, rows: int, group: int
) -> Result:
    for part in (scale, *zero):
        _fits(part, _scale_result(x, rows=rows, group=group, dtype=dtype))
    if len(zero) > (dtype == torch.uint8):
        raise TypeError("at most one tensor of zero points, of 4-bit codes")
    return x[0], dtype


def _packed_result(codes: Result, *, group: int) -> Result:
    count, width = _matrix(codes)
    if codes[1] != torch.uint8 or group % 2:
        raise TypeError("4-bit codes in uint8, and an even group")
    return (count, packed_width(width, group)), torch.uint8


def _matrix(x: Result) -> tuple[int, int]:
    if len(x[0]) != 2 or min(x[0]) < 1:
        raise ValueError("no matrix")
    return x[0][0], x[0][1]


def _fits(part: Result, wanted: Result) -> None:
    if part[0] != wanted[0]:
        raise ValueError(f"{part[0]} is not one of each block, {wanted[0]}")


QUANTIZING: Mapping[str, tuple[Callable[..., Tensor], Callable[..., Result]]] = {
    "quantize_scale": (_quantize_scale, _scale_result),
    "quantize_range": (_quantize_range, _scale_result),
    "quantize_zero": (_quantize_zero, _zero_result),
    "quantize_codes": (_quantize_codes, _codes_result),
    "pack_codes": (_pack_codes, _packed_result),
}
"""By name: the function, and what it gives for shapes and dtypes of operands."""

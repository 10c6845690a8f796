"""Codes: to them and back, by tensor, axis and block. Weights in codes are read in weights.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call, Result, Rule
from .dtypes import DTYPES, dtype_of

_RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767)}


def _spread(c: Call, part: Tensor, x: Tensor) -> Tensor:
    """A scale or zero point for each element of x."""
    if part.dim() == 0 or part.numel() == 1 and part.dim() <= 1:
        return part.reshape(())
    axis, block = c.integer("axis", 1) % x.dim(), c.integer("block_size", 0)
    if part.dim() == 1 and not block:
        return part.reshape([-1 if place == axis else 1 for place in range(x.dim())])
    size = x.shape[axis]
    return part.repeat_interleave(block, dim=axis).narrow(axis, 0, size)


def _dequantize(c: Call) -> Tensor:
    codes, scale, zero = c.tensor(0), c.tensor(1), c.maybe(2)
    wide = codes.to(torch.float32)
    if zero is not None:
        wide = wide - _spread(c, zero.to(torch.float32), codes)
    code = c.integer("output_dtype", 0)
    dtype = dtype_of(c, code) if code else scale.dtype
    return (wide * _spread(c, scale.float(), codes)).to(dtype)


def _quantize(c: Call) -> Tensor:
    x, scale, zero = c.tensor(0), c.tensor(1), c.maybe(2)
    code = c.integer("output_dtype", 0)
    dtype = zero.dtype if zero is not None else DTYPES.get(code, torch.uint8)
    if dtype not in _RANGES:
        c.refuse("codes of int8, uint8 or int16", str(dtype))
    steps = torch.round(x / _spread(c, scale, x))
    if zero is not None:
        steps = steps + _spread(c, zero.to(steps.dtype), x)
    return steps.clamp(*_RANGES[dtype]).to(dtype)


def _dynamic(c: Call) -> Result:
    x = c.tensor(0)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale).clamp(0, 255)
    codes = (torch.round(x / scale) + zero).clamp(0, 255)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


RULES: dict[str, Rule] = {
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic,
    "QuantizeLinear": _quantize,
}

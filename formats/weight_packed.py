"""What others' quantized tensors take to be read, as operations of the weight grammar.

Codes packed into int32 are taken apart; codes, scales and zero points become the weight that they
stand for. Passes find the parts again in the expression (`stored_codes.py`), so that an engine
keeps codes where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .weight_quant import NotFiniteError, Result, blocks, spread

WORD = 32  # bits


def _unpack_int32(x: Tensor, *, bits: int, dim: int, offset: int) -> Tensor:
    """int32 words -> uint8 codes along `dim`, the lowest bits first; `offset` is added to each,
    modulo 2 ** bits.
    """
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=x.device)
    codes = (x.movedim(dim, -1).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    codes = (codes + offset) & ((1 << bits) - 1)
    return codes.flatten(-2).movedim(-1, dim).to(torch.uint8)


def _argsort(x: Tensor) -> Tensor:
    return torch.argsort(x, stable=True)


def _take(x: Tensor, index: Tensor, *, dim: int) -> Tensor:
    return x.index_select(dim, index)


def _finite(x: Tensor) -> Tensor:
    if not bool(torch.isfinite(x.float()).all()):
        raise NotFiniteError("NaN or an infinity")
    return x


def _dequantize_codes(
    codes: Tensor, scale: Tensor, *zero: Tensor, dtype: torch.dtype, rows: int, group: int
) -> Tensor:
    """(codes - zero) * scale in float32, then in `dtype`: codes [N, K] one a byte, a scale and a
    zero point for each block of `rows` x `group`.
    """
    wide = codes.float()
    if zero:
        wide = wide - spread(zero[0].float(), codes, rows, group)
    return (wide * spread(scale.float(), codes, rows, group)).to(dtype)


def _meets_codes(x: Tensor, *static: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    """x itself: a weight whose products round their other operand to codes of `dtype`, with a
    scale a row and `group` columns, or with the `static` scale [1].
    """
    return x


def _unpacked_result(x: Result, *, bits: int, dim: int, offset: int) -> Result:
    if x[1] != torch.int32 or bits not in (4, 8) or not 0 <= offset < 1 << bits:
        raise TypeError("int32 words of 4 or 8 bits, and an offset of no more")
    shape = list(x[0])
    shape[dim] *= WORD // bits
    return tuple(shape), torch.uint8


def _argsort_result(x: Result) -> Result:
    if len(x[0]) != 1:
        raise ValueError("no vector")
    return x[0], torch.int64


def _take_result(x: Result, index: Result, *, dim: int) -> Result:
    if len(index[0]) != 1 or index[1] != torch.int64:
        raise TypeError("an index of int64 [n]")
    return (*x[0][:dim], index[0][0], *x[0][dim + 1 :]), x[1]


def _dequantized_result(
    codes: Result, scale: Result, *zero: Result, dtype: torch.dtype, rows: int, group: int
) -> Result:
    (count, width), kind = codes
    wanted = (blocks(count, rows), blocks(width, group))
    if any(part[0] != wanted for part in (scale, *zero)) or len(zero) > 1:
        raise ValueError(f"scales and zero points are not {list(wanted)}")
    if kind not in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        raise TypeError("codes in uint8, int8 or float8_e4m3fn")
    return codes[0], dtype


def _meeting_result(x: Result, *static: Result, dtype: torch.dtype, group: int) -> Result:
    if len(static) > 1 or any(part[0] != (1,) or group for part in static):
        raise ValueError("one static scale [1], without groups")
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError("codes in int8 or float8_e4m3fn")
    return x


PACKED: Mapping[str, tuple[Callable[..., Tensor], Callable[..., Result]]] = {
    "unpack_int32": (_unpack_int32, _unpacked_result),
    "argsort": (_argsort, _argsort_result),
    "take": (_take, _take_result),
    "finite": (_finite, lambda x: x),
    "dequantize_codes": (_dequantize_codes, _dequantized_result),
    "meets_codes": (_meets_codes, _meeting_result),
}
"""By name: the function, and what it gives for shapes and dtypes of operands."""

"""ggml's blocks of quantized weights taken apart into codes, scales and zero points.

A row of a GGUF tensor is a sequence of blocks, each a structure of bytes (ggml's ``ggml-common.h``
has them). Here such rows, uint8 [N, B], become the codes of their weights, one a byte, and what a
group of them shares, so that ``(code - zero) * scale`` is the weight: Q4_1, Q4_K and Q5_K store
``code * scale - least`` instead, whose zero point is a number between codes. A group of one number
only has no steps there; its codes are 0, its zero point is 1 and its scale that number, negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .weight_quant import Result

_SUPER = 256  # weights of a block that holds several groups
_PAIRS = 32  # bytes with the codes of two groups of 32

Parts = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class BlockForm:
    """A ggml type that is kept in codes.

    Attributes:
        width: weights of a block.
        size: bytes of a block.
        group: weights that share a scale.
        codes: dtype of the codes: uint8 for 4 bits, int8 for more.
        scale: dtype of the scales; those that are products of two numbers need float32.
        split: blocks uint8 [n, size] -> codes [n, width], scales [n, groups] and what is taken off
            ``code * scale`` [n, groups], None where it is the middle of the codes.
    """

    width: int
    size: int
    group: int
    codes: torch.dtype
    scale: torch.dtype
    split: Callable[[Tensor], Parts]


def _halves(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """float16 [n, count] from byte ``start`` of each block."""
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., W] -> [..., 2 W]: all low halves, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _q4_0(blocks: Tensor) -> Parts:
    return _nibbles(blocks[:, 2:]), _halves(blocks, 0), None


def _q4_1(blocks: Tensor) -> Parts:
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0), -_halves(blocks, 2)


def _q8_0(blocks: Tensor) -> Parts:
    return blocks[:, 2:].contiguous().view(torch.int8), _halves(blocks, 0), None


def _super_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets float32 [n, 8] of the groups of Q4_K and Q5_K: 6 bits each, in 12 bytes of
    which the first 8 lend their upper 2 bits to the last 4 groups.
    """
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (rest & 15) | (first >> 6 << 4)), -1)
    offsets = torch.cat((second & 63, (rest >> 4) | (second >> 6 << 4)), -1)
    wide = _halves(blocks, 0, 2).float()
    return scales * wide[:, :1], offsets * wide[:, 1:]


def _by_pairs(packed: Tensor) -> Tensor:
    """uint8 [n, 128] -> [n, 8, 32]: 32 bytes hold a group in their low halves, and the next."""
    return _nibbles(packed.reshape(-1, 4, _PAIRS)).reshape(-1, 8, _PAIRS)


def _q4_k(blocks: Tensor) -> Parts:
    return _by_pairs(blocks[:, 16:]).flatten(1), *_super_scales(blocks)


def _q5_k(blocks: Tensor) -> Parts:
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[:, 16:48].unsqueeze(1) >> bits) & 1
    codes = _by_pairs(blocks[:, 48:]) | (fifth << 4)
    return codes.flatten(1).to(torch.int8), *_super_scales(blocks)


def _q6_k(blocks: Tensor) -> Parts:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | (high << 4)).flatten(1).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8) * _halves(blocks, 208).float()
    return codes, scales, None


_U8, _I8, _F16, _F32 = torch.uint8, torch.int8, torch.float16, torch.float32
BLOCK_FORMS: Mapping[str, BlockForm] = {
    "Q4_0": BlockForm(32, 18, 32, _U8, _F16, _q4_0),
    "Q4_1": BlockForm(32, 20, 32, _U8, _F16, _q4_1),
    "Q8_0": BlockForm(32, 34, 32, _I8, _F16, _q8_0),
    "Q4_K": BlockForm(_SUPER, 144, 32, _U8, _F32, _q4_k),
    "Q5_K": BlockForm(_SUPER, 176, 32, _I8, _F32, _q5_k),
    "Q6_K": BlockForm(_SUPER, 210, 16, _I8, _F32, _q6_k),
}
"""By ggml's name of the type."""
OFFSET_FORMS = frozenset({"Q4_1", "Q4_K", "Q5_K"})
"""Those whose groups have zero points."""


def _ggml_codes(rows: Tensor, *, form: str) -> Tensor:
    """uint8 [N, B] of blocks -> codes [N, K]."""
    codes, scale, offset = _split(rows, form)
    if offset is not None:
        flat = (scale == 0).repeat_interleave(BLOCK_FORMS[form].group, -1)
        codes = codes.masked_fill(flat, 0)
    return codes.reshape(rows.shape[0], -1)


def _ggml_scale(rows: Tensor, *, form: str) -> Tensor:
    """uint8 [N, B] of blocks -> scales [N, groups]."""
    _, scale, offset = _split(rows, form)
    if offset is not None:
        scale = torch.where(scale == 0, offset, scale)
    return scale.reshape(rows.shape[0], -1)


def _ggml_zero(rows: Tensor, *, form: str) -> Tensor:
    """uint8 [N, B] of blocks -> zero points float32 [N, groups]."""
    _, scale, offset = _split(rows, form)
    assert offset is not None, "a form with zero points"
    zero = torch.where(scale == 0, 1.0, offset.float() / scale.float())
    return zero.reshape(rows.shape[0], -1)


def _split(rows: Tensor, form: str) -> Parts:
    known = BLOCK_FORMS[form]
    return known.split(rows.reshape(-1, known.size))


def _groups_of(rows: Result, form: str) -> tuple[int, int]:
    """Rows and groups in each."""
    if form not in BLOCK_FORMS:
        raise ValueError(f"form {form!r} is not one of {', '.join(BLOCK_FORMS)}")
    known, (shape, dtype) = BLOCK_FORMS[form], rows
    if len(shape) != 2 or dtype != torch.uint8 or shape[1] % known.size or 0 in shape:
        raise TypeError(f"rows of blocks of {known.size} bytes, uint8 [N, B]")
    return shape[0], shape[1] // known.size * (known.width // known.group)


def _codes_result(rows: Result, *, form: str) -> Result:
    count, groups = _groups_of(rows, form)
    return (count, groups * BLOCK_FORMS[form].group), BLOCK_FORMS[form].codes


def _scale_result(rows: Result, *, form: str) -> Result:
    return _groups_of(rows, form), BLOCK_FORMS[form].scale


def _zero_result(rows: Result, *, form: str) -> Result:
    if form in BLOCK_FORMS and form not in OFFSET_FORMS:
        raise ValueError(f"{form} has no zero points")
    return _groups_of(rows, form), torch.float32


GGML: Mapping[str, tuple[Callable[..., Tensor], Callable[..., Result]]] = {
    "ggml_codes": (_ggml_codes, _codes_result),
    "ggml_scale": (_ggml_scale, _scale_result),
    "ggml_zero": (_ggml_zero, _zero_result),
}
"""By name: the function, and what it gives for shapes and dtypes of operands."""

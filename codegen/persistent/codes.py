"""Products whose weights are codes: which of them the one launch takes, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.dtypes import DType
from ...ir.node import Node
from ...ir.ops.quant import packed_width
from ..triton.kernels.linear_tiles import Problem
from ..triton.kernels.quant_linear_tiles import Quantized
from ..triton.kernels.scaled_linear_tiles import Scaled, scaled_in
from ..triton.layout import located

_ROWS = 16  # a block's rows of scales hold whole chunks of at most so many


@dataclass(frozen=True, slots=True)
class Codes:
    """How weights stand for numbers, the same in all products of a model that have codes.

    Attributes:
        bits: of a code: 8 (e4m3), or 4 (two a byte, less 8).
        group: columns that share a scale, 0 for all of a row.
        block: rows that share one.
        scale_bytes: of a scale: 4 (float32) or 2 (bfloat16).
        rounds: whether x is rounded to e4m3 too, by the same groups.
    """

    bits: int
    group: int
    block: int
    scale_bytes: int
    rounds: bool

    def row_bytes(self, k: int) -> int:
        """From a row of codes to the next one."""
        return k if self.bits == 8 else packed_width(k, self.group)


@dataclass(frozen=True, slots=True)
class CodedProduct:
    """A product with codes, as the plain kernels see it.

    Attributes:
        problem: over a body in which the weight is one more input, behind the call's own.
        codes: what the weight consists of.
        weight, scale: inputs of the body.
    """

    problem: Problem
    codes: Codes
    weight: Node
    scale: Node


def coded_product(node: Node) -> CodedProduct | None:
    """What a call multiplies with, where that is codes of a kind that the kernel knows: e4m3 by
    rows or blocks, x rounded alike or not at all; 4 bits by groups, without zero points.
    """
    layouts = tuple(None if arg is None else located(arg)[1] for arg in node.args)
    scaled = None
    if scaled_in(node) is None:
        found = Quantized.of(node, layouts)
    else:
        scaled = Scaled.of(node, layouts)
        found = None if scaled is None else scaled.quantized
    if found is None or found.zero is not None:
        return None
    rounds = scaled is not None
    plain = scaled is None or (scaled.static is None and scaled.rounds.attr("tries") is None)
    codes, k = _codes_of(found, rounds), found.problem.k
    if not plain or codes is None or found.width != codes.row_bytes(k):
        return None
    return CodedProduct(found.problem, codes, found.codes, found.scale)


def _codes_of(found: Quantized, rounds: bool) -> Codes | None:
    kinds = {(DType.F8E4M3, DType.F32): (8, 4), (DType.U8, DType.BF16): (4, 2)}
    kinds[DType.U8, DType.F32] = (4, 4)
    kind = kinds.get((found.codes.dtype, found.scale.dtype))
    by_blocks = found.group > 0 and kind is not None and kind[0] == 8
    block = found.rows
    fits = block == 1 or (by_blocks and block > 0 and block % _ROWS == 0)
    group = found.group
    # Groups that no chunk cuts: the narrowest chunk has 256 columns.
    whole = group == 0 or (8 <= group <= 256 and group & (group - 1) == 0)
    if kind is None or not fits or not whole:
        return None
    return Codes(kind[0], group, block, kind[1], rounds)

"""What a product of 4-bit weights and rows rounded to int8 is asked for, and its default cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from ....ir.dtypes import DType
from ....ir.node import Node
from ....ir.ops.quant import blocks
from ....targets import Target
from ..layout import Layout
from .linear_tiles import _FEW, _ROWS, Cutting, GemmTiles, GemvTiles, _power
from .quant_linear_tiles import (
    Quantized,
    cut_gemms,
    default_quant_gemms,
    dequantized_in,
    invariant_quant_gemm,
)

SPAN = 32
"""Columns that a thread loads at once for one token, 16 bytes; groups hold whole ones."""
_WIDEST = 128  # columns that a group of x has at most
_LEAST = 64  # columns of a step of several tokens: an instruction takes 32 of each half


@dataclass(frozen=True, slots=True)
class Packed:
    """A ``fused`` node of kind "linear" whose weight is 4-bit codes, and lets the product round its
    other operand to int8.

    Attributes:
        quantized: the product over x as it is before it is rounded.
    """

    quantized: Quantized

    @classmethod
    def of(cls, node: Node, layouts: Sequence[Layout | None]) -> Packed | None:
        """The problem of a node, None where the kernels do not take it."""
        weight = dequantized_in(node)
        if weight is None or weight.attr("compute") is not DType.I8:
            return None
        quantized = Quantized.of(node, layouts)
        if quantized is None or quantized.codes.dtype is not DType.U8 or quantized.width % 4:
            return None
        group = quantized.group
        fits = group == 0 or (group >= SPAN and group == _power(group))
        return cls(quantized) if fits else None

    @property
    def group(self) -> int:
        """Columns of x that share a scale."""
        return min(self.quantized.group or _WIDEST, _WIDEST)

    @property
    def half(self) -> int:
        """Codes of the even columns of a row of x, and of the odd ones: bytes of a row of the
        weight, filled up to whole spans.
        """
        return blocks(self.quantized.width, SPAN // 2) * (SPAN // 2)

    @property
    def groups(self) -> int:
        """Of a row of x."""
        return blocks(2 * self.half, self.group)

    @property
    def by_matrix(self) -> bool:
        """Whether several tokens are rounded too: where a group is as wide as a step."""
        return self.group >= _LEAST

    def takes(self, tiles: GemmTiles) -> bool:
        """Whether a step of several tokens lies within a group."""
        return not self.by_matrix or _LEAST <= tiles.block_k <= self.group


def cut_packed_gemv(packed: Packed, target: Target, cutting: Cutting) -> GemvTiles:
    """The tiles for one token that a tuner chose for a call, else the default."""
    chosen = None if cutting.chosen is None else cutting.chosen.gemv(packed.quantized.node)
    return chosen or default_packed_gemv(packed, target)


def default_packed_gemv(packed: Packed, target: Target) -> GemvTiles:
    """For one token: 4 rows, so that what a thread loads of x serves all of them, and of each 16
    bytes a thread. One warp sums without shared memory, and has few sums to bring together; where
    rows are long two of them have more bytes on their way.
    """
    p = packed.quantized.problem
    block_k = min(2048 if p.k > 4096 else 1024, max(_power(p.k), SPAN))
    rows = max(1, min(4 // p.parts, _power(p.n)))
    return GemvTiles(rows, block_k, max(1, block_k // (32 * SPAN)))


def default_packed_gemms(
    packed: Packed, target: Target, cutting: Cutting
) -> list[GemmTiles] | None:
    """For several tokens, the last ones for any number; None where there are none."""
    q = packed.quantized
    if not packed.by_matrix:
        return default_quant_gemms(q, target, cutting)
    gemms = cut_gemms(q.node, q.problem, partial(_gemm, packed, target), cutting)
    return gemms if gemms is not None and all(map(packed.takes, gemms)) else None


def invariant_packed_gemm(packed: Packed, target: Target) -> GemmTiles | None:
    """For any number of tokens the same, in one part; None where none fit the target."""
    if not packed.by_matrix:
        return invariant_quant_gemm(packed.quantized, target)
    tiles = _gemm(packed, target, 64)
    return tiles and replace(tiles, splits=1)


def _gemm(packed: Packed, target: Target, block_m: int) -> GemmTiles | None:
    """A tile of 64 rows, and of each as much of a group as a step may have. Products with few
    programs share their rows among several, as the plain ones do.
    """
    p = packed.quantized.problem
    few = p.n * p.parts / _ROWS / target.sms < _FEW
    splits = (4 if block_m == 16 else 2) if few else 1
    wanted = [(packed.group, 4, splits), (packed.group, 3, 1), (_LEAST, 2, 1), (_LEAST, 1, 1)]
    for block_k, stages, parts in wanted:
        tiles = GemmTiles(block_m, max(1, _ROWS // p.parts), block_k, 4, stages, parts)
        fits = packed_shared_bytes(packed, tiles) <= target.shared_memory_per_block
        if fits and tiles.has_work(p.k):
            return tiles
    return None


def packed_shared_bytes(packed: Packed, tiles: GemmTiles) -> int:
    """Shared memory of a block, an upper bound: codes in flight, one decoded tile, one result."""
    rows = tiles.block_n * packed.quantized.problem.parts
    in_flight = tiles.num_stages * tiles.block_k * (rows // 2 + tiles.block_m)
    return in_flight + rows * tiles.block_k + 4 * rows * tiles.block_m + (1 << 10)

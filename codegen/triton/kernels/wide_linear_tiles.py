"""How products of many tokens are cut, and which of them the kernel takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ....ir.dtypes import DType
from ....targets import Target
from .linear_tiles import Problem, are_taken

FEWEST = 512
"""Tokens from which a gated product is ours until a tuner says more: fewer leave multiprocessors
without a tile.
"""
_ARCHITECTURES = (90,)  # where it was measured
_ALIGNMENT = 16  # bytes between rows, for a descriptor
_BARRIERS = 1 << 10  # bytes, of which each stage has a few
_SUMS = 128  # of a thread, beside which others find room in its 255 registers


SPACE: Mapping[str, tuple[int, ...]] = {
    "block_m": (64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "block_k": (64, 128),
    "group": (8, 16),
    "num_warps": (4, 8),
    "num_stages": (3, 4, 5),
    "strips": (1, 2),
    "shared": (False, True),
    "flat": (False, True),
}
"""What may be tuned, and the values to try: the fields of `WideTiles`."""


@dataclass(frozen=True, slots=True)
class WideTiles:
    """How the kernel is cut.

    Attributes:
        block_m, block_n: tokens and columns of a tile of the result; block_k: of a step.
        group: tiles of tokens that are computed with the same columns in turn.
        num_warps, num_stages: as Triton takes them.
        strips: 1 or 2, in which a tile is rounded and stored: two need half the shared memory.
        shared: whether tiles that do not fill a whole round of programs are computed by all of
            them, a share of the steps each.
        flat: whether the first steps of a program's next tile are brought while one is stored.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3
    strips: int = 1
    shared: bool = False
    flat: bool = True


def takes_wide(problem: Problem, target: Target) -> bool:
    """Whether the kernel takes a product on a target: of 16 bits, whose rows lie as descriptors
    want them, and with ops behind it that kernels have.
    """
    x, size = problem.x, problem.linear.dtype.bytes
    rows = [problem.k, problem.n, *([x.row, x.offset] if problem.norm is None else [])]
    aligned = all(isinstance(row, int) and row * size % _ALIGNMENT == 0 for row in rows)
    narrow = problem.linear.dtype in (DType.F16, DType.BF16) and problem.node.dtype.bytes == size
    return target.arch in _ARCHITECTURES and aligned and narrow and are_taken(problem, ())


def takes_tiles(problem: Problem, tiles: WideTiles, target: Target) -> bool:
    """Whether a block has the shared memory of a cut, its threads registers for the sums, and each
    strip columns of one sum.
    """
    sums, threads = tiles.block_m * tiles.block_n * problem.parts, 32 * tiles.num_warps
    whole = tiles.strips == 1 or problem.parts == 1
    fits = wide_shared_bytes(problem, tiles) <= target.shared_memory_per_block
    return whole and fits and threads <= sums <= _SUMS * threads


def wide_shared_bytes(problem: Problem, tiles: WideTiles) -> int:
    """Shared memory of a block, an upper bound: what is on its way, a strip of the result, and as
    much of what is read beside it, which goes through there to the threads that have the sums.
    """
    rows = tiles.block_m + tiles.block_n * problem.parts
    on_the_way = tiles.num_stages * tiles.block_k * rows
    stored = tiles.block_m * tiles.block_n // tiles.strips
    reads = any(place.row != 0 and place.column != 0 for place in problem.places.values())
    return (on_the_way + stored * (1 + reads)) * problem.linear.dtype.bytes + _BARRIERS


def default_wide(problem: Problem) -> WideTiles:
    """Tiles of 128 x 256 sums, the most that a block's registers hold; in two strips where more
    than the sums is held behind them.
    """
    if problem.parts == 2:
        return WideTiles()
    more = bool(problem.members) or problem.bias is not None
    return WideTiles(block_n=256, strips=1 + more)


def fills(problem: Problem, target: Target) -> bool:
    """Whether ``FEWEST`` tokens give every multiprocessor a tile of the default."""
    tiles = default_wide(problem)
    return FEWEST // tiles.block_m * -(-problem.n // tiles.block_n) >= target.sms

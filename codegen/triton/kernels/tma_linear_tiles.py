"""How linears of many tokens are cut, and which of them the kernel takes."""

from __future__ import annotations

from dataclasses import dataclass

from ....ir.dtypes import DType
from ....targets import Target
from .linear_tiles import Problem, are_taken

TMA = 90  # the first architecture with a copy engine
_ALIGNED = 16  # bytes, of which rows' starts and strides are multiples
_MOVED = 8 << 10  # bytes; the most of ptxas over the cuts of benchmarks/bench_tma_linear.py
_SUMS = 128  # a thread, beside which others find room in its 255 registers
_HALVED = 128  # rows of weights, of which each of two groups of warps takes one instruction's 64
_REGISTERS = 65536  # of a multiprocessor, which one block has to itself


@dataclass(frozen=True, slots=True)
class TmaTiles:
    """How the kernel for many tokens is cut.

    Attributes:
        block_m: tokens of a tile; ``block_n``: its columns; ``block_k``: of a step.
        group: blocks of tokens that are gone down before the next columns.
        num_warps, num_stages: as Triton takes them.
        strips: 1 or 2, in which a tile is rounded and stored: two need half the registers.
        flat: whether the first steps of the next tile are brought while one is stored.
        special: whether warps of their own bring tiles, and two groups of four (``num_warps`` must
            be 4) multiply halves of one: Triton makes them of a loop that is not flat.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int
    strips: int = 1
    flat: bool = True
    special: bool = False


def takes_tma(problem: Problem, target: Target) -> bool:
    """Whether the kernel takes a problem on a target: 16-bit floats, rows that start at multiples
    of 16 bytes, ops behind that kernels have, and a device that has tensor descriptors (the
    interpreter, which stands for CPUs, has them too).
    """
    x, dtype = problem.x, problem.linear.dtype
    if dtype not in (DType.F16, DType.BF16) or not (target.is_cpu or target.arch >= TMA):
        return False
    strides = [problem.k] if problem.norm is not None else [problem.k, x.row, x.offset]
    aligned = all(isinstance(s, int) and s * dtype.bytes % _ALIGNED == 0 for s in strides)
    return aligned and are_taken(problem, ())


def tma_shared_bytes(problem: Problem, tiles: TmaTiles) -> int:
    """Shared memory of a block, an upper bound: what is in flight, and what of the sums changes
    places among threads before the store: little at a time, but for strips of two halves, which are
    not where a warp's own sums are.
    """
    rows = tiles.block_n * problem.parts
    in_flight = tiles.num_stages * tiles.block_k * (rows + tiles.block_m)
    strips = problem.parts == 2 and tiles.strips == 2
    moved = 2 * rows * tiles.block_m if strips else _MOVED
    return in_flight * problem.linear.dtype.bytes + moved + (1 << 10)


def tma_fits(problem: Problem, tiles: TmaTiles, target: Target) -> bool:
    """Whether a block has the shared memory, its threads registers for the sums, and special warps
    the loop that they are made of.
    """
    sums = tiles.block_m * tiles.block_n * problem.parts
    warps = 8 if tiles.special else tiles.num_warps
    fits = tma_shared_bytes(problem, tiles) <= target.shared_memory_per_block
    fits &= 32 * warps <= sums <= min(_REGISTERS // 2, _SUMS * 32 * warps)
    halves = not tiles.flat and tiles.num_warps == 4 and tiles.block_n % _HALVED == 0
    return fits and (halves or not tiles.special)


def default_tma(problem: Problem, target: Target) -> TmaTiles | None:
    """Tiles of 128 x 256 sums, the largest that a block's registers hold; None where the kernel
    takes no such problem, or the target's blocks hold no tile.
    """
    if not takes_tma(problem, target):
        return None
    half = 2 // problem.parts
    wanted = (
        TmaTiles(128, 128 * half, 64, 8, 8, 4),
        TmaTiles(128, 64 * half, 64, 8, 8, 3),
        TmaTiles(64, 32 * half, 64, 8, 4, 2),
    )
    return next((tiles for tiles in wanted if tma_fits(problem, tiles, target)), None)

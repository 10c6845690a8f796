"""Which experts the kernels by descriptors take, and how they are cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ....ir.dtypes import DType
from ....targets import Target
from .experts_tiles import (
    BUCKETS,
    PRODUCTS,
    Groups,
    GroupTiles,
    Problem,
    Product,
    default_groups,
)

_ARCHITECTURES = (90,)  # where descriptors are read well by what Triton makes of them
_ALIGNMENT = 16  # bytes between rows, and of where they begin, for a descriptor
_BARRIERS = 1 << 10  # bytes, of which each stage has a few
_LEAST_M = 64  # rows of an instruction of the tensor cores
_SUMS = 128  # of a thread, beside which others find room in its 255 registers
_FLAT = 2048  # elements of a row: there it took 5% less, and at 4096 and 14336 4% more
_WARPS = 8  # of a multiprocessor, whose registers hold _SUMS of each of their threads

SPACE: Mapping[str, tuple[int, ...]] = {
    "block_m": (64, 128),
    "block_n": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
    "group": (8, 16),
    "flat": (False, True),
    "shared": (False, True),
}
"""What may be tuned, and the values to try: fields of `WideTiles`. ``block_k`` is what a descriptor
swizzles at once, 128 bytes of a row.
"""


@dataclass(frozen=True, slots=True)
class WideTiles(GroupTiles):
    """How a product of many pairs is cut whose tiles come by descriptors.

    Attributes:
        flat: whether the first steps of a program's next tile are brought while one is stored.
        shared: of down, whether tiles that do not fill a whole round of programs are computed by
            all of them, a share of the steps each, as in wide_linear.py; never flat.
    """

    flat: bool = True
    shared: bool = False


_WANTED: Mapping[tuple[Product, int], WideTiles] = {
    ("gate_up", 64): WideTiles(64, 128, 64, 4, 2),
    ("gate_up", 128): WideTiles(128, 128, 64, 8, 3),
    ("down", 64): WideTiles(64, 256, 64, 4, 2),
    ("down", 128): WideTiles(128, 256, 64, 8, 3),
}


def takes_wide(problem: Problem, target: Target) -> bool:
    """Whether the kernels take experts on a target: of 16 bits, their weights in dense rows that
    lie as descriptors want them.
    """
    p = problem
    if target.arch not in _ARCHITECTURES or p.dtype not in (DType.F16, DType.BF16):
        return False
    if not p.in_rows or p.strides(3)[0] != 2 * p.inner * p.width:
        return False
    places = (p.width, p.inner, p.offset(3), p.offset(4), p.strides(4)[0])
    return all(place * p.dtype.bytes % _ALIGNMENT == 0 for place in places)


def takes_tiles(problem: Problem, product: Product, tiles: WideTiles, target: Target) -> bool:
    """Whether a block has the shared memory of a cut, and its threads registers for the sums."""
    sums, threads = tiles.block_m * _rows(product, tiles), 32 * tiles.num_warps
    fits = wide_shared_bytes(problem, product, tiles) <= target.shared_memory_per_block
    return fits and tiles.block_m >= _LEAST_M and threads <= sums <= _SUMS * threads


def wide_shared_bytes(problem: Problem, product: Product, tiles: WideTiles) -> int:
    """Shared memory of a block, an upper bound: what is on its way, and a tile of the result."""
    on_the_way = tiles.num_stages * tiles.block_k * (tiles.block_m + _rows(product, tiles))
    stored = tiles.block_m * tiles.block_n
    return (on_the_way + stored) * problem.dtype.bytes + _BARRIERS


def resident(problem: Problem, product: Product, tiles: WideTiles, target: Target) -> int:
    """Programs that a multiprocessor holds at once, by shared memory and registers."""
    shared = wide_shared_bytes(problem, product, tiles) + _BARRIERS
    return max(1, min(target.shared_memory_per_sm // shared, _WARPS // tiles.num_warps))


def default_wide(
    problem: Problem, product: Product, target: Target, block_m: int
) -> WideTiles | None:
    """Tiles of 128 sums a thread; None where the kernels take no such experts, or a block has no
    room.
    """
    if block_m < _LEAST_M or not takes_wide(problem, target):
        return None
    outputs, length = problem.sizes(product)
    wanted = _WANTED[product, block_m]
    tiles = replace(
        wanted,
        block_n=min(wanted.block_n, max(16, _power(outputs))),
        block_k=min(wanted.block_k, max(16, _power(length))),
        flat=is_flat(length),
    )
    return tiles if takes_tiles(problem, product, tiles, target) else None


def is_flat(length: int) -> bool:
    """Whether tiles of rows of so many elements follow each other flat by default: where they have
    few steps, for each pays for it.
    """
    return length <= _FLAT


def default_tiles(problem: Problem, target: Target, block_m: int) -> Groups | None:
    """Of both products, where tiles have ``block_m`` pairs: by descriptors for the most alone,
    for with fewer the weights' way from memory decides. None where no tiles fit the target.
    """
    if block_m == BUCKETS[-1]:
        wide = [default_wide(problem, x, target, block_m) for x in PRODUCTS]
        if wide[0] is not None and wide[1] is not None:
            return wide[0], wide[1]
    first, second = (default_groups(problem, x, target, block_m) for x in PRODUCTS)
    return None if first is None or second is None else (first, second)


def _rows(product: Product, tiles: WideTiles) -> int:
    """Rows of weights of a tile."""
    return tiles.block_n * (2 if product == "gate_up" else 1)


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()

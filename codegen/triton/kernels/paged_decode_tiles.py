"""How paged decode attention is cut: tiles, splits of the sequence, their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ....ir.dims import Size, call
from ....ir.dtypes import DType
from ....targets import Target
from .paged_attention_tiles import Problem, block

SPACE: Mapping[str, tuple[int | bool | None, ...]] = {
    "block_n": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
    "waves": (1, 2, 3, 4, 6, 8),
    "min_keys": (64, 128, 256),
    "prefetch": (0, 1, 2, 4),
    "by_page": (False, True),
    "evict_first": (False, True),
    "fixed_split_keys": (None, 512, 1024, 2048),
}
"""What may be tuned, and the values to try: the fields of `Tiles`."""

BUCKETS = (1, 8, 32, 128)
"""Sequences of a step up to which there is one cut; the last one is for any number.

The grid fills the device by itself, so what a step asks of a cut changes where the splits do: alone
a sequence is spread over all multiprocessors, up to 8 still share them, 32 times a few KV heads
fill them with hardly a split, and beyond there are several waves of whole sequences.
"""

MAX_SPLITS = 128
_MERGED = 8192  # elements of partial results that a program of the merge holds at once


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the kernel is cut.

    Attributes:
        block_n: keys of a tile.
        num_warps, num_stages: as Triton takes them.
        waves: programs for each multiprocessor, where there are keys enough.
        min_keys: keys of a split at least.
        prefetch: tiles of a split that are brought to L2 while the kernel before still runs.
        by_page: look up each page once instead of once a key, where the page size is a power of
            two that is known.
        evict_first: whether the cache's bytes leave L2 first.
        fixed_split_keys: keys of every split, so that a sequence gets the same bits alone and in a
            batch; None to split by what fills the target.
    """

    block_n: int
    num_warps: int
    num_stages: int
    waves: int = 2
    min_keys: int = 64
    prefetch: int = 0
    by_page: bool = True
    evict_first: bool = False
    fixed_split_keys: int | None = None

    @property
    def least(self) -> int:
        """Tiles of a split at least."""
        return max(1, -(-self.min_keys // self.block_n))

    @property
    def share(self) -> int | None:
        """Tiles of every split where that is fixed."""
        keys = self.fixed_split_keys
        return None if keys is None else max(1, -(-keys // self.block_n))


DEFAULTS: Mapping[bool, tuple[tuple[int, Tiles], ...]] = {
    False: (
        (64, Tiles(128, 4, 3, prefetch=2)),
        (128, Tiles(64, 4, 4, prefetch=2)),
        (128, Tiles(64, 4, 2)),
        (256, Tiles(32, 4, 3)),
        (256, Tiles(32, 4, 2)),
        (512, Tiles(16, 8, 2)),
        (1024, Tiles(16, 8, 1)),
    ),
    True: (
        (32, Tiles(32, 4, 2)),
        (256, Tiles(16, 4, 2)),
        (512, Tiles(16, 8, 1)),
    ),
}
"""By whether elements are float32: (largest block of head dims, tiles), the first that fits is
taken. In float32 dots run on plain FMA units, with operands in registers, so tiles are smaller.
"""


def default_tiles(
    problem: Problem, target: Target, fixed_split_keys: int | None = None
) -> Tiles | None:
    """The first default that fits the problem and the target; None where none does."""
    widest = max(block(problem.head_dim), block(problem.value_dim))
    for width, tiles in DEFAULTS[problem.node.dtype is DType.F32]:
        if widest <= width and fits(problem, tiles, target):
            return replace(tiles, fixed_split_keys=fixed_split_keys)
    return None


def block_rows(problem: Problem) -> int:
    """Rows of a tile: the query heads of one KV head, or a chunk of them."""
    return block(problem.chunk_heads)


def fits(problem: Problem, tiles: Tiles, target: Target) -> bool:
    """Whether a tile fits the target's shared memory."""
    return shared_bytes(problem, tiles) <= target.shared_memory_per_block


def shared_bytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of a block, an upper bound: keys and values in flight, queries, weights, page
    ids and what the warps exchange.
    """
    block_d, block_e = block(problem.head_dim), block(problem.value_dim)
    # As many tiles are on their way as there are stages before the one that computes.
    in_flight = max(tiles.num_stages - 1, 1) * tiles.block_n * (block_d + block_e)
    resident = block_rows(problem) * (block_d + tiles.block_n)
    return (in_flight + resident) * problem.node.dtype.bytes + (2 << 10)


def num_splits(problem: Problem, tiles: Tiles, target: Target) -> Size:
    """Programs that share a sequence's keys: enough to fill the target, and no more than the block
    table can hold keys for. A captured grid serves all lengths, so that is all that is known.
    """
    capacity = problem.node.operands[3].shape[1] * problem.node.operands[1].shape[1]
    if tiles.share is not None:
        return call("max", 1, _ceil(capacity, tiles.share * tiles.block_n))
    rows = call("max", 1, problem.num_seqs) * (problem.kv_heads * problem.head_chunks)
    filling = call("floordiv", tiles.waves * target.sms, rows)
    useful = _ceil(capacity, tiles.least * tiles.block_n)
    return call("min", MAX_SPLITS, call("max", 1, call("min", filling, useful)))


def merged_splits(problem: Problem) -> int:
    """Splits that a program of the merge reads at once."""
    return min(MAX_SPLITS, max(16, _MERGED // block(problem.value_dim)))


def pages_are_looked_up(problem: Problem, tiles: Tiles) -> bool:
    """Whether the kernel looks up pages instead of keys."""
    page_size = problem.node.operands[1].shape[1]
    known = isinstance(page_size, int) and page_size & (page_size - 1) == 0
    return tiles.by_page and known


def _ceil(size: Size, unit: int) -> Size:
    return call("floordiv", size + (unit - 1), unit)

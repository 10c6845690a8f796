"""What paged attention is asked for, and how its kernel is cut: tiles, splits, their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from ....ir.dims import Size, call
from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ..layout import Layout, is_dense

SPACE: Mapping[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128),
    "block_n": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}
"""What may be tuned, and the values to try: the fields of `Tiles` but those of hopper_attention.py:
``programs``, none or one on each multiprocessor, and ``both_ways``.
"""

MAX_SPLITS = 32
_WAVES = 2  # programs of a decode step for each multiprocessor, where there are keys enough
_MAX_WINDOW = 1 << 30  # positions are 32-bit: a larger window hides nothing
_MAX_HEADS = 32  # query heads of one KV head in one tile: more would fill the registers
_MAX_HEADS_F32 = 16


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the kernel is cut.

    Attributes:
        block_m: rows of a tile, each a (token, head) pair of one KV head.
        block_n: keys of a tile.
        num_warps, num_stages: as Triton takes them; of hopper_attention.py, the warps that
            multiply, and tiles of keys in shared memory.
        programs: of hopper_attention.py, which stay for all tiles; 0 for the plain kernel.
        both_ways: whether every second of these begins at the end, with the shortest tiles of rows.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 0
    both_ways: bool = False


_Rows = tuple[tuple[int, Tiles], ...]
# (largest block of head dims, tiles): the first that fits is taken. In float32 dots run on plain
# FMA units, with operands in registers, so that tiles are smaller and warps more. Head dims to 64
# take 128 keys a tile, as flash attention does: weights are rounded relative to a tile's maximum,
# so sequences of one tile give its very bits.
DECODE: Mapping[bool, _Rows] = {
    False: (
        (64, Tiles(16, 128, 4, 2)),
        (128, Tiles(16, 64, 4, 2)),
        (256, Tiles(16, 32, 4, 2)),
        (512, Tiles(16, 16, 8, 2)),
        (1024, Tiles(16, 16, 8, 1)),
    ),
    True: (
        (32, Tiles(16, 32, 4, 2)),
        (256, Tiles(16, 16, 4, 2)),
        (512, Tiles(16, 16, 8, 1)),
    ),
}
PREFILL: Mapping[bool, _Rows] = {
    False: (
        (64, Tiles(64, 128, 8, 2)),
        (128, Tiles(64, 32, 4, 3)),
        (256, Tiles(64, 32, 8, 2)),
        (256, Tiles(32, 32, 8, 2)),
        (512, Tiles(32, 16, 8, 1)),
        (1024, Tiles(16, 16, 8, 1)),
    ),
    True: (
        (64, Tiles(32, 32, 4, 2)),
        (256, Tiles(16, 16, 4, 2)),
        (512, Tiles(16, 16, 8, 1)),
    ),
}


# Prefill for head dims of 65 to 128 where warp groups multiply: sums stay out of the way of the
# next products' operands, and two blocks share a multiprocessor.
_WARP_GROUPS = (range(90, 120), 128, Tiles(64, 64, 4, 2))


@dataclass(frozen=True, slots=True)
class Problem:
    """A ``paged_attention`` that the kernel takes: what its text depends on, apart from tiles.

    Attributes:
        node: the call.
        q: where q [T, H, D] lies in its buffer.
        heads, kv_heads, head_dim, value_dim: H, G, D and E.
    """

    node: Node
    q: Layout
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    @classmethod
    def of(cls, node: Node, layouts: Sequence[Layout | None]) -> Problem | None:
        """The problem of a node, None where the kernel does not take it."""
        q, k_cache, v_cache = node.operands[:3]
        sizes = (q.shape[1], k_cache.shape[2], q.shape[2], v_cache.shape[3])
        static = all(isinstance(size, int) and size > 0 for size in sizes)
        present = zip(node.args[1:], layouts[1:], strict=True)
        dense = all(a is None or (x is not None and is_dense(x, a.shape)) for a, x in present)
        typed = q.dtype in (DType.F32, DType.F16, DType.BF16)
        if not (static and dense and typed and layouts[0] and _finite(node)):
            return None
        return cls(node, layouts[0], *sizes)  # type: ignore[arg-type]

    @property
    def head_chunks(self) -> int:
        """Tiles that the query heads of one KV head are spread over."""
        most = _MAX_HEADS_F32 if self.node.dtype is DType.F32 else _MAX_HEADS
        return -(-self.heads // self.kv_heads // most)

    @property
    def chunk_heads(self) -> int:
        """Query heads in a tile."""
        return -(-self.heads // self.kv_heads // self.head_chunks)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.node.attr("scale"))  # type: ignore[arg-type]

    @property
    def softcap(self) -> float | None:
        """Bound of the scores."""
        softcap = self.node.attr("softcap")
        return None if softcap is None else float(softcap)  # type: ignore[arg-type]

    @property
    def window(self) -> int | None:
        """Keys that a token sees, its own included; None for all."""
        window = self.node.attr("window")
        assert window is None or isinstance(window, int)
        return None if window is None or window > _MAX_WINDOW else window

    @property
    def num_sinks(self) -> int:
        """First keys that are seen from beyond the window, by queries of their own."""
        sinks = self.node.attr("num_sinks")
        assert sinks is None or isinstance(sinks, int)
        return 0 if sinks is None or self.window is None else sinks

    @property
    def num_tokens(self) -> Size:
        """T."""
        return self.node.operands[0].shape[0]

    @property
    def num_seqs(self) -> Size:
        """B."""
        return self.node.operands[4].shape[0]


def default_tiles(problem: Problem, target: Target, table: Mapping[bool, _Rows]) -> Tiles | None:
    """The first tiles of a table that fit the problem and the target; None where none do."""
    widest = max(block(problem.head_dim), block(problem.value_dim))
    wide = problem.node.dtype is DType.F32
    rows = table[wide]
    archs, most, grouped = _WARP_GROUPS
    if table is PREFILL and not wide and target.arch in archs and most // 2 < widest:
        rows = ((most, grouped), *rows)
    for width, tiles in rows:
        block_m = max(tiles.block_m, block(problem.chunk_heads))
        fitting = Tiles(block_m, tiles.block_n, tiles.num_warps, tiles.num_stages)
        if widest <= width and shared_bytes(problem, fitting) <= target.shared_memory_per_block:
            return fitting
    return None


def shared_bytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of a block, an upper bound: keys and values in flight, queries, weights."""
    block_d, block_e = block(problem.head_dim), block(problem.value_dim)
    in_flight = tiles.num_stages * tiles.block_n * (block_d + block_e)
    resident = tiles.block_m * (2 * block_d if tiles.programs else block_d + tiles.block_n)
    return (in_flight + resident) * problem.node.dtype.bytes + (1 << 10)


def num_splits(problem: Problem, target: Target) -> Size:
    """Programs that share a sequence's keys in decode: enough to fill the target, 1 to 32."""
    rows = call("max", 1, problem.num_seqs) * (problem.kv_heads * problem.head_chunks)
    return call("min", MAX_SPLITS, call("max", 1, call("floordiv", _WAVES * target.sms, rows)))


def block(size: int) -> int:
    """The least power of two that holds ``size`` and that ``tl.dot`` takes."""
    return max(16, 1 << (size - 1).bit_length())


def _finite(node: Node) -> bool:
    """Whether the kernel's text can hold the attributes as numbers; a cap of 0 would divide."""
    scale, softcap = node.attr("scale"), node.attr("softcap")
    assert isinstance(scale, int | float) and isinstance(softcap, int | float | None)
    return isfinite(scale) and (softcap is None or (isfinite(softcap) and softcap != 0))

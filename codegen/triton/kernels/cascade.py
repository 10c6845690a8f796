"""Cascade attention in Triton: decode over a paged cache where sequences share their first pages.

Three launches. ``shared``: queries of a group's members, stacked as rows of a tile (members times
the query heads of one KV head), meet the pages that they share, which are split over programs; a
tile of 128 rows and thousands of keys is bound by tensor cores, not by memory. ``own``: what is
behind, as paged_decode.py has it, of sequences of no group all. ``join``: each row's parts by their
maxima and sums of weights, shared ones first. Both the order of sums and how they are cut differ
from paged_decode.py's, so results differ by reassociation.

Who shares what stands in three arrays of the step's size (ir/ops/share_pages.py): a captured graph
takes any groups. A tile of rows may hold members of several groups; it walks the pages of one after
the other, and masks tell whose rows a part is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ....ir.dims import Size, call, product
from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ..layout import Layout, is_dense, located
from ..source import (
    HEADER,
    PDL,
    Constexpr,
    KernelSource,
    Launch,
    Pointer,
    Scalar,
    Variant,
    has_pdl,
    jit_text,
)
from . import cascade_kernel, paged_attention_kernel, paged_decode_kernel, paged_decode_tiles
from .entries import Entry, entry_of
from .paged_attention_tiles import Problem, block
from .paged_decode_tiles import block_rows, pages_are_looked_up

SPACE: Mapping[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128),
    "block_n": (16, 32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
    "waves": (1, 2, 4),
}
"""What may be tuned, and the values to try: the fields of `Tiles`."""

MAX_SPLITS = 32
MIN_KEYS = 256
"""Keys of a split of shared pages at least: a part costs as many bytes as 8 keys a query head."""

_JOINED = 16  # parts that a program of the join holds at once
_LOG2E = 1.4426950408889634
_OPERANDS = ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "sinks")
_GROUPS = ("group_rows", "group_ids", "shared_pages")
_PARTS = ("partial_acc", "partial_max", "partial_sum")
_FROM_ATTENTION = ("_tanh", "_seen", "_weights_of", "_meet")
_FROM_DECODE = (
    *("_page_ids", "_slots", "_cache_rows", "_prefetch"),
    *("_first_tiles", "_step", "_split"),
)
_FUNCTIONS = ("_shares", "_parts", "_shared", "_own", "_join")


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the shared pages are cut; what is behind is cut as `paged_decode_tiles` says.

    Attributes:
        block_m: rows of a tile, each a (sequence, head) pair of one KV head.
        block_n: keys of a tile.
        num_warps, num_stages: as Triton takes them.
        waves: programs for each multiprocessor, where there are keys enough.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    waves: int = 1

    @property
    def least(self) -> int:
        """Tiles of a split at least."""
        return max(1, MIN_KEYS // self.block_n)


DEFAULTS: Mapping[bool, tuple[tuple[int, Tiles], ...]] = {
    False: (
        (128, Tiles(64, 64, 8, 2, waves=2)),
        (128, Tiles(128, 64, 8, 3)),
        (256, Tiles(64, 32, 8, 2)),
        (256, Tiles(32, 32, 4, 2)),
    ),
    True: (
        (64, Tiles(32, 32, 4, 2)),
        (256, Tiles(16, 16, 4, 2)),
    ),
}
"""By whether elements are float32: (largest block of head dims, tiles), the first that fits."""


HOPPER = Tiles(64, 64, 4, 2, waves=2)
"""Of nine cuts the quickest or nearly, in eight cases on an H200 (benchmarks/NOTES.md), up to 128
dims. Other architectures' products take more registers, and spill 96 to 264 bytes.
"""


def default_tiles(problem: Problem, target: Target) -> Tiles | None:
    """The first default that fits; None where none does."""
    widest = max(block(problem.head_dim), block(problem.value_dim))
    of_all = DEFAULTS[problem.node.dtype is DType.F32]
    own = target.arch == 90 and problem.node.dtype is not DType.F32
    for width, tiles in ((128, HOPPER), *of_all) if own else of_all:
        if widest <= width and fits(problem, tiles, target):
            return tiles
    return None


def fits(problem: Problem, tiles: Tiles, target: Target) -> bool:
    """Whether a tile holds the heads of a KV head, and the target's shared memory the tile."""
    block_d, block_e = block(problem.head_dim), block(problem.value_dim)
    in_flight = tiles.num_stages * tiles.block_n * (block_d + block_e)
    resident = tiles.block_m * (block_d + tiles.block_n)
    needed = (in_flight + resident) * problem.node.dtype.bytes + (2 << 10)
    group = problem.heads // problem.kv_heads
    return group <= tiles.block_m and needed <= target.shared_memory_per_block


def cascades(node: Node) -> bool:
    """Whether an attention may read shared pages once: of one token a sequence, which sees all keys
    and no distances, over pages that ``share_pages`` tells of or may be told of.
    """
    if node.op != "paged_attention" or node.args[5] is not None:
        return False
    weighed = [node.args[7], node.args[8], node.attr("window"), node.attr("num_sinks")]
    return all(x is None for x in weighed)


def emit_cascade(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """The kernel of a ``paged_attention`` whose tables come from ``share_pages``; its call has the
    operands of `cascade_operands`.

    None for others, where `cascades` says no, and for what no tile fits.
    """
    if not cascades(node) or node.operands[3].op != "share_pages":
        return None
    problem = Problem.of(node, layouts)
    tiles = None if problem is None else default_tiles(problem, target)
    if problem is None or tiles is None:
        return None
    for group in cascade_operands(node)[-3:]:
        if group is None or not is_dense(located(group)[1], group.shape):
            return None
    return cascade_source(problem, tiles, target)


def cascade_operands(node: Node) -> tuple[Node | None, ...]:
    """What the kernel of such a node reads: q, caches, tables, lengths, sinks, and the groups."""
    tables = node.operands[3]
    return (*node.args[:5], node.args[6], *tables.operands[1:])


def cascade_source(
    problem: Problem,
    tiles: Tiles,
    target: Target,
    splits: Size | None = None,
    own: paged_decode_tiles.Tiles | None = None,
    own_splits: Size | None = None,
) -> KernelSource | None:
    """The kernel with these tiles, ``splits`` of shared pages and ``own_splits`` of the rest, by
    default as many as fill the target; None where no tile of ``own`` fits it.
    """
    rest = own or paged_decode_tiles.default_tiles(problem, target)
    if rest is None:
        return None
    cut = _Cut(
        problem,
        tiles,
        rest,
        num_splits(problem, tiles, target) if splits is None else splits,
        paged_decode_tiles.num_splits(problem, rest, target) if own_splits is None else own_splits,
        has_pdl(target),
    )
    entries = (cut.shared(), cut.own(), cut.join())
    count = product((problem.num_seqs, problem.heads, cut.splits + cut.own_splits))
    spaces = ((DType.F32, count * problem.value_dim), (DType.F32, count), (DType.F32, count))
    texts = [
        HEADER,
        jit_text(paged_attention_kernel, _FROM_ATTENTION),
        jit_text(paged_decode_kernel, _FROM_DECODE),
        jit_text(cascade_kernel, _FUNCTIONS),
        *(entry.text for entry in entries),
    ]
    variant = Variant(tuple(entry.launch for entry in entries), spaces)
    return KernelSource("cascade", "template", "".join(texts), (variant,), contracts=True)


def num_splits(problem: Problem, tiles: Tiles, target: Target) -> Size:
    """Programs that share the pages of a tile of rows: enough to fill the target with the tiles of
    all rows, and no more than the block table can hold keys for.
    """
    capacity = problem.node.operands[3].shape[1] * problem.node.operands[1].shape[1]
    rows = call("max", 1, _tiles_of_rows(problem, tiles) * problem.kv_heads)
    filling = call("floordiv", tiles.waves * target.sms, rows)
    useful = _ceil(capacity, tiles.least * tiles.block_n)
    return call("min", MAX_SPLITS, call("max", 1, call("min", filling, useful)))


def _tiles_of_rows(problem: Problem, tiles: Tiles) -> Size:
    return _ceil(problem.num_seqs, tiles.block_m // (problem.heads // problem.kv_heads))


def _ceil(size: Size, unit: int) -> Size:
    return call("floordiv", size + (unit - 1), unit)


@dataclass(frozen=True, slots=True)
class _Cut:
    """The launches of a cut."""

    problem: Problem
    tiles: Tiles
    rest: paged_decode_tiles.Tiles
    splits: Size
    own_splits: Size
    pdl: bool
    pointers: dict[str, Pointer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        node = self.problem.node
        args = zip((*_OPERANDS, *_GROUPS), cascade_operands(node), strict=True)
        for index, (name, arg) in enumerate(args):
            if arg is not None:
                self.pointers[name] = Pointer(name, arg.dtype, "operand", index)
        self.pointers["out"] = Pointer("out", node.dtype, "result", 0)
        for index, name in enumerate(_PARTS):
            self.pointers[name] = Pointer(name, DType.F32, "workspace", index)

    def shared(self) -> Entry:
        """Groups over the pages that they share."""
        problem, tiles = self.problem, self.tiles
        page = problem.node.operands[1].shape[1]
        plain = problem.softcap is None and "sinks" not in self.pointers and problem.scale > 0
        constants = {
            **self._widths(),
            "FACTOR": problem.scale * _LOG2E if plain else 1.0,
            "PAGE": page if isinstance(page, int) else None,
            "LEAST": tiles.least,
        }
        tiling = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, PDL: self.pdl}
        names = ("q", "k_cache", "v_cache", "block_tables", *_GROUPS, *_PARTS)
        grid = (problem.kv_heads, self.splits, _tiles_of_rows(problem, tiles))
        launch = Launch(
            "shared", self._given(names), grid, tiling, tiles.num_warps, tiles.num_stages
        )
        sizes = (*self._strides(), Scalar("num_seqs", problem.num_seqs), *self._sizes(caches=True))
        return entry_of(launch, "_shared", sizes, constants)

    def own(self) -> Entry:
        """Each sequence over what is behind."""
        problem, rest = self.problem, self.rest
        constants = {
            **self._widths(),
            **self._ends(),
            "HEAD_CHUNKS": problem.head_chunks,
            "BY_PAGE": pages_are_looked_up(problem, rest),
            "PREFETCH": rest.prefetch,
            "EVICT": "evict_first" if rest.evict_first else "",
        }
        names = (*_OPERANDS, "shared_pages", "out", *_PARTS)
        tiling = {"BLOCK_M": block_rows(problem), "BLOCK_N": rest.block_n, PDL: self.pdl}
        grid = (problem.kv_heads * problem.head_chunks, self.own_splits, problem.num_seqs)
        launch = Launch("own", self._given(names), grid, tiling, rest.num_warps, rest.num_stages)
        absent: dict[str, Constexpr | None] = {"sinks": None}
        sizes = (*self._strides(), *self._sizes(caches=True))
        return entry_of(launch, "_own", sizes, absent | constants)

    def join(self) -> Entry:
        """The parts of both."""
        problem = self.problem
        constants: dict[str, Constexpr | None] = {
            **self._ends(),
            "HEADS": problem.heads,
            "VALUE_DIM": problem.value_dim,
            "BLOCK_E": block(problem.value_dim),
            "BLOCK_S": _JOINED,
            "BLOCK_N": self.rest.block_n,
        }
        names = (*_PARTS, "seq_lens", "shared_pages", "out")
        grid = (problem.heads, problem.num_seqs, 1)
        launch = Launch("join", self._given(names), grid, {PDL: self.pdl})
        return entry_of(launch, "_join", self._sizes(caches=False), constants)

    def _given(self, names: tuple[str, ...]) -> tuple[Pointer, ...]:
        return tuple(self.pointers[name] for name in names if name in self.pointers)

    def _widths(self) -> dict[str, Constexpr | None]:
        problem = self.problem
        return {
            "KV_HEADS": problem.kv_heads,
            "GROUP": problem.heads // problem.kv_heads,
            "HEAD_DIM": problem.head_dim,
            "VALUE_DIM": problem.value_dim,
            "BLOCK_D": block(problem.head_dim),
            "BLOCK_E": block(problem.value_dim),
            "SCALE": problem.scale,
            "SOFTCAP": problem.softcap,
        }

    def _ends(self) -> dict[str, Constexpr | None]:
        """What decides how many parts a row has: the same wherever they are counted."""
        return {
            "SHARED_N": self.tiles.block_n,
            "SHARED_LEAST": self.tiles.least,
            "LEAST": self.rest.least,
        }

    def _strides(self) -> tuple[Scalar, ...]:
        q = self.problem.q
        names = ("q_offset", "q_stride_t", "q_stride_h", "q_stride_d")
        return tuple(
            Scalar(name, size, "i64")
            for name, size in zip(names, (q.offset, *q.strides), strict=True)
        )

    def _sizes(self, caches: bool) -> tuple[Scalar, ...]:
        k_cache, block_tables = self.problem.node.operands[1], self.problem.node.operands[3]
        pages = (Scalar("num_pages", k_cache.shape[0]),) if caches else ()
        return (
            *pages,
            Scalar("table_width", block_tables.shape[1]),
            Scalar("page_size", k_cache.shape[1]),
            Scalar("shared_splits", self.splits),
            Scalar("own_splits", self.own_splits),
        )

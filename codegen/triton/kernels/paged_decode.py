"""Attention over a paged KV cache where each sequence has one token: decode, in Triton.

Each sequence's keys are split over programs, and a second launch merges the parts
(Flash-Decoding). A grid depends on sizes, not on lengths, so that a CUDA graph may hold it:
programs without keys end at once, and a row that one program computed is not merged. Where a tuner
found other cuts for few sequences than for many, each has a variant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ....ir.dims import Size, call, product
from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ..cuts import Cuts
from ..layout import Layout
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
from . import paged_attention_kernel, paged_decode_kernel
from .entries import Entry, described, entry_of
from .paged_attention_tiles import Problem, block
from .paged_decode_tiles import (
    BUCKETS,
    Tiles,
    block_rows,
    default_tiles,
    merged_splits,
    num_splits,
    pages_are_looked_up,
)

_OPERANDS = (
    "q",
    "k_cache",
    "v_cache",
    "block_tables",
    "seq_lens",
    None,
    "sinks",
    "alibi",
    "q_sinks",
)
_PARTS = ("partial_acc", "partial_max", "partial_sum")
_FUNCTIONS = (
    *("_extent", "_page_ids", "_slots", "_cache_rows", "_prefetch"),
    *("_first_tiles", "_step", "_split", "_decode", "_merge"),
)


def emit_paged_decode(
    node: Node,
    layouts: tuple[Layout | None, ...],
    target: Target,
    cuts: Cuts | None = None,
    most: int | None = None,
) -> KernelSource | None:
    """A kernel for a ``paged_attention`` without ``query_start`` in float32, float16 or bfloat16,
    cut as ``cuts`` says for up to ``most`` sequences (None: any number; more are right all the
    same).

    None for one with it, where the element type is another, an operand but q is a strided view, a
    number of heads or a head dim is symbolic, or no tile fits the target's shared memory.
    """
    if node.args[5] is not None:
        return None
    problem = Problem.of(node, layouts)
    if problem is None:
        return None
    tiles = default_tiles(problem, target)
    if tiles is None:
        return None
    if cuts is None:
        return paged_decode_source(problem, tiles, target)
    found = {size: cuts.decode(node, size) or tiles for size in buckets(most)}
    return bucketed_source(problem, found, target)


def buckets(most: int | None) -> Sequence[int]:
    """The numbers of sequences that have a cut of their own, in steps of up to ``most``."""
    return [
        size
        for size, before in zip(BUCKETS, (0, *BUCKETS), strict=False)
        if most is None or before < most
    ]


def paged_decode_source(
    problem: Problem, tiles: Tiles, target: Target, splits: Size | None = None
) -> KernelSource:
    """The kernel of a problem with these tiles; ``splits`` of a sequence are as many as the tiles
    say where none are given.
    """
    entries = _Entries(problem, target)
    return entries.source([entries.variant(tiles, splits)])


def bucketed_source(problem: Problem, cuts: Mapping[int, Tiles], target: Target) -> KernelSource:
    """The kernel with the tiles of each number of sequences, in rising order; the last ones are for
    any number. Neighbours that are cut alike share a variant.
    """
    entries = _Entries(problem, target)
    ends = list(cuts.items())
    variants = []
    for (most, tiles), (_, following) in zip(ends, [*ends[1:], (0, None)], strict=True):
        if following is not None and _alike(problem, tiles, following):
            continue
        guard = () if following is None else (most - problem.num_seqs,)
        variants.append(replace(entries.variant(tiles, suffix=f"_{most}"), guard=guard))
    return entries.source(variants)


def _alike(problem: Problem, tiles: Tiles, other: Tiles) -> bool:
    by_page = pages_are_looked_up(problem, tiles) == pages_are_looked_up(problem, other)
    return by_page and replace(tiles, by_page=True) == replace(other, by_page=True)


@dataclass(slots=True)
class _Entries:
    """The entry points of a kernel's text, each text once."""

    problem: Problem
    target: Target
    names: dict[str, str] = field(default_factory=dict)  # of each text as the first variant has it

    def variant(self, tiles: Tiles, splits: Size | None = None, suffix: str = "") -> Variant:
        """The launches of a cut; ``suffix`` is for names that are taken."""
        problem, target = self.problem, self.target
        if splits is None:
            splits = num_splits(problem, tiles, target)
        parts = tuple(Pointer(name, DType.F32, "workspace", i) for i, name in enumerate(_PARTS))
        if splits == 1:
            return Variant((self._entered(_attend(problem, tiles, target, splits, ()), suffix),))
        # One split writes the result itself: nothing is kept, and the merge has no programs.
        several = call("min", 1, splits - 1)
        entries = (
            _attend(problem, tiles, target, splits, parts),
            _merge(problem, tiles, target, splits, several, parts),
        )
        count = product((problem.num_seqs, problem.heads, splits, several))
        spaces = ((DType.F32, count * problem.value_dim), (DType.F32, count), (DType.F32, count))
        return Variant(tuple(self._entered(entry, suffix) for entry in entries), spaces)

    def source(self, variants: Sequence[Variant]) -> KernelSource:
        """The kernel of these variants."""
        texts = [
            HEADER,
            described(self.problem.node, _OPERANDS),
            jit_text(paged_attention_kernel, ("_tanh",)),
            jit_text(paged_decode_kernel, _FUNCTIONS),
            *(_renamed(text, name) for text, name in self.names.items()),
        ]
        text = "".join(texts)
        return KernelSource("paged_decode", "template", text, tuple(variants), contracts=True)

    def _entered(self, entry: Entry, suffix: str) -> Launch:
        name = entry.launch.function
        if entry.text not in self.names:
            taken = name in self.names.values()
            self.names[entry.text] = name + suffix if taken else name
        return replace(entry.launch, function=self.names[entry.text])


def _renamed(text: str, name: str) -> str:
    """An entry point's text under another name."""
    before, _, rest = text.partition("def ")
    return f"{before}def {name}({rest.partition('(')[2]}"


def _attend(
    problem: Problem, tiles: Tiles, target: Target, splits: Size, parts: tuple[Pointer, ...]
) -> Entry:
    node = problem.node
    operands = tuple(
        Pointer(name, arg.dtype, "operand", index)
        for index, (name, arg) in enumerate(zip(_OPERANDS, node.args, strict=True))
        if name is not None and arg is not None
    )
    pointers = (*operands, Pointer("out", node.dtype, "result", 0), *parts)
    constants: dict[str, Constexpr | None] = {
        "KV_HEADS": problem.kv_heads,
        "GROUP": problem.heads // problem.kv_heads,
        "HEAD_CHUNKS": problem.head_chunks,
        "HEAD_DIM": problem.head_dim,
        "VALUE_DIM": problem.value_dim,
        "BLOCK_D": block(problem.head_dim),
        "BLOCK_E": block(problem.value_dim),
        "SCALE": problem.scale,
        "SOFTCAP": problem.softcap,
        "BY_PAGE": pages_are_looked_up(problem, tiles),
        "PREFETCH": tiles.prefetch,
        "EVICT": "evict_first" if tiles.evict_first else "",
    }
    absent: dict[str, Constexpr | None] = dict.fromkeys(("sinks", "alibi", "q_sinks", *_PARTS))
    tiling = {"BLOCK_M": block_rows(problem), "BLOCK_N": tiles.block_n, PDL: has_pdl(target)}
    grid = (problem.kv_heads * problem.head_chunks, splits, problem.num_seqs)
    launch = Launch("decode", pointers, grid, tiling, tiles.num_warps, tiles.num_stages)
    stride_t, stride_h, stride_d = problem.q.strides
    sizes = (
        Scalar("q_offset", problem.q.offset, "i64"),
        Scalar("q_stride_t", stride_t, "i64"),
        Scalar("q_stride_h", stride_h, "i64"),
        Scalar("q_stride_d", stride_d, "i64"),
        Scalar("num_pages", node.operands[1].shape[0]),
    )
    cut = _cut(problem, tiles)
    return entry_of(launch, "_decode", sizes + _sizes(problem, splits), absent | constants | cut)


def _merge(
    problem: Problem,
    tiles: Tiles,
    target: Target,
    splits: Size,
    several: Size,
    parts: tuple[Pointer, ...],
) -> Entry:
    seq_lens = Pointer("seq_lens", problem.node.operands[4].dtype, "operand", 4)
    pointers = (*parts, seq_lens, Pointer("out", problem.node.dtype, "result", 0))
    constants: dict[str, Constexpr | None] = {
        "HEADS": problem.heads,
        "VALUE_DIM": problem.value_dim,
        "BLOCK_E": block(problem.value_dim),
        "BLOCK_S": merged_splits(problem),
        "BLOCK_N": tiles.block_n,
    }
    grid = (problem.heads, problem.num_seqs * several, 1)
    launch = Launch("merge", pointers, grid, {PDL: has_pdl(target)})
    return entry_of(launch, "_merge", _sizes(problem, splits), constants | _cut(problem, tiles))


def _cut(problem: Problem, tiles: Tiles) -> dict[str, Constexpr | None]:
    """What decides how a sequence is split: the same for the splits and for their merge."""
    return {
        "WINDOW": problem.window,
        "NUM_SINKS": problem.num_sinks,
        "LEAST": tiles.least,
        "SHARE": tiles.share,
    }


def _sizes(problem: Problem, splits: Size) -> tuple[Scalar, ...]:
    k_cache, block_tables = problem.node.operands[1], problem.node.operands[3]
    return (
        Scalar("table_width", block_tables.shape[1]),
        Scalar("page_size", k_cache.shape[1]),
        Scalar("splits", splits),
    )

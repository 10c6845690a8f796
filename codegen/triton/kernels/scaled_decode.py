"""Paged decode attention over codes: the kernel of paged_decode.py with scales, in Triton.

Splits, their merge, buckets and how pages are found are the plain kernel's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
from . import paged_attention_kernel, paged_decode_kernel, scaled_decode_kernel
from .entries import Entry, described, entry_of
from .paged_attention_tiles import Problem, block
from .paged_decode import _alike, _cut, _Entries, _merge, _renamed, _sizes, buckets
from .paged_decode_tiles import Tiles, block_rows, num_splits, pages_are_looked_up
from .scaled_tiles import OPERANDS, decode_tiles, scaled_problem

_PARTS = ("partial_acc", "partial_max", "partial_sum")
_SHARED = (
    *("_extent", "_page_ids", "_slots", "_cache_rows", "_prefetch"),
    *("_first_tiles", "_merge"),
)
_OWN = ("_weighted", "_scaled_step", "_scaled_decode")


def emit_scaled_decode(
    node: Node,
    layouts: tuple[Layout | None, ...],
    target: Target,
    cuts: Cuts | None = None,
    most: int | None = None,
) -> KernelSource | None:
    """A kernel for a ``scaled_paged_attention`` without ``query_start``, as ``emit_paged_decode``
    has it; None also where the target has no type for the codes.
    """
    problem = None if node.args[5] is not None else scaled_problem(node, layouts, target)
    tiles = None if problem is None else decode_tiles(problem, target)
    if problem is None or tiles is None:
        return None
    if cuts is None:
        return scaled_decode_source(problem, tiles, target)
    found = {size: cuts.decode(node, size) or tiles for size in buckets(most)}
    return _bucketed(problem, found, target)


def scaled_decode_source(
    problem: Problem, tiles: Tiles, target: Target, splits: Size | None = None
) -> KernelSource:
    """The kernel of a problem with these tiles; ``splits`` as in ``paged_decode_source``."""
    entries = _ScaledEntries(problem, target)
    return entries.source([entries.variant(tiles, splits)])


def _bucketed(problem: Problem, cuts: Mapping[int, Tiles], target: Target) -> KernelSource:
    entries = _ScaledEntries(problem, target)
    ends = list(cuts.items())
    variants = []
    for (most, tiles), (_, following) in zip(ends, [*ends[1:], (0, None)], strict=True):
        if following is not None and _alike(problem, tiles, following):
            continue
        guard = () if following is None else (most - problem.num_seqs,)
        variants.append(replace(entries.variant(tiles, suffix=f"_{most}"), guard=guard))
    return entries.source(variants)


@dataclass(slots=True)
class _ScaledEntries(_Entries):
    """The entry points over codes and scales."""

    def variant(self, tiles: Tiles, splits: Size | None = None, suffix: str = "") -> Variant:
        """The launches of a cut; ``suffix`` is for names that are taken."""
        problem, target = self.problem, self.target
        if splits is None:
            splits = num_splits(problem, tiles, target)
        parts = tuple(Pointer(name, DType.F32, "workspace", i) for i, name in enumerate(_PARTS))
        if splits == 1:
            return Variant((self._entered(_attend(problem, tiles, target, splits, ()), suffix),))
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
            described(self.problem.node, OPERANDS),
            jit_text(paged_attention_kernel, ("_tanh",)),
            jit_text(paged_decode_kernel, _SHARED),
            jit_text(scaled_decode_kernel, _OWN),
            *(_renamed(text, name) for text, name in self.names.items()),
        ]
        text = "".join(texts)
        return KernelSource("scaled_decode", "template", text, tuple(variants), contracts=True)


def _attend(
    problem: Problem, tiles: Tiles, target: Target, splits: Size, parts: tuple[Pointer, ...]
) -> Entry:
    node = problem.node
    operands = tuple(
        Pointer(name, arg.dtype, "operand", index)
        for index, (name, arg) in enumerate(zip(OPERANDS, node.args, strict=True))
        if arg is not None
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
    every = (*sizes, *_sizes(problem, splits))
    return entry_of(launch, "_scaled_decode", every, absent | constants | cut)

"""Paged decode attention for the tuner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from types import ModuleType

import torch

from ....autotune.prior import Constants, Work
from ....autotune.space import (
    Choice,
    Config,
    Constraint,
    Integer,
    Space,
    Value,
)
from ....ir.dims import evaluate
from ....ir.node import Node
from ....targets import Target
from ..kernels import paged_attention_tiles, paged_decode, paged_decode_kernel, paged_decode_tiles
from ..kernels.paged_attention_tiles import Problem
from ..kernels.paged_decode import paged_decode_source
from ..kernels.paged_decode_tiles import (
    Tiles,
    block_rows,
    default_tiles,
    num_splits,
    pages_are_looked_up,
    shared_bytes,
)
from ..source import KernelSource
from .lengths import longest, mean_length, mixed_lengths, most_pages
from .paged import cached, head_facts, key_bytes, scaled_facts
from .problem import layouts_of
from .template import Contents, Facts, Sizes, Template, int_, power_range, sensible, with_default

FULL = "full_lengths"
"""Among sizes: all sequences are as long as the block table allows."""

CAPACITIES = (2048, 4096, 8192)
"""Tokens that a row of the block table holds, as problems are told apart."""

_FIXED = ("fixed_split_keys",)  # what makes a Program deterministic is not tuned
_MOST_BYTES = 4 << 30  # of a problem's cache


class PagedDecode(Template):
    """The kernel for sequences of one token each.

    Lengths are not known when a step is captured: all that is, is the bucket of sequences and the
    tokens that a row of the block table has room for, which ``max_model_len`` gives. So these are
    the problem (`mixed_sizes`): it is timed over steps of mixed lengths (lengths.py), of several
    seeds, at the top of the bucket and at the next of 2048, 4096 and 8192 tokens, which also stands
    for more: from there on more room gives no further splits, and few sequences fill it. Benchmarks
    time sequences that are all as long as their rows (`sizes_of`).
    """

    name = "paged_decode"
    constants = Constants(
        latency=7.09e-6,
        dram=1.32,
        sm=18.9e9,
        tensor=0.554,
        tail=0.165,
        overlap=3.12,
        part=3.42e-6,
        accumulator=0.0189,
    )
    modules: tuple[ModuleType, ...] = (
        paged_decode,
        paged_decode_kernel,
        paged_decode_tiles,
        paged_attention_tiles,
    )
    copies = 8
    op = "paged_attention"

    def takes(self, node: Node) -> bool:
        """A call of the op without ``query_start`` that the kernel computes."""
        if node.op != self.op or node.args[5] is not None:
            return False
        return Problem.of(node, layouts_of(node)) is not None

    def serves(self, node: Node, target: Target) -> bool:
        """Also some tile fits the target."""
        return self.takes(node) and self.tiles(problem_of(node), target) is not None

    def tiles(self, problem: Problem, target: Target) -> Tiles | None:
        """``default_tiles`` of the kernel."""
        return default_tiles(problem, target)

    def shared(self, problem: Problem, tiles: Tiles) -> int:
        """``shared_bytes`` of the kernel."""
        return shared_bytes(problem, tiles)

    def facts(self, node: Node, sizes: Sizes) -> Facts:
        """Heads, head dims, page, what is added to scores; batch, context and its use."""
        p = problem_of(node)
        page, capacity = _room(node, sizes)
        return (
            *head_facts(p),
            *scaled_facts(node),
            ("page_size", page),
            ("sequences", evaluate(p.num_seqs, sizes)),
            ("context", capacity),
            ("lengths", "full" if sizes.get(FULL) else "mixed"),
        )

    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Tiles, splits of a sequence, and how pages are read."""
        p, default = problem_of(node), self.default(node, sizes, target)
        stages = int_(default, "num_stages")
        return Space(
            (
                power_range("block_n", 16, 128, int_(default, "block_n")),
                power_range("num_warps", 1, 8, int_(default, "num_warps")),
                Integer("num_stages", min(2, stages), max(5, stages)),
                with_default("waves", (1, 2, 3, 4, 6), int_(default, "waves")),
                with_default("min_keys", (64, 128), int_(default, "min_keys")),
                with_default("prefetch", (0, 2), int_(default, "prefetch")),
                Choice("by_page", (default["by_page"],)),
                Choice("evict_first", (False,)),
            ),
            (
                Constraint(
                    "what the block's shared memory holds",
                    lambda c: self.shared(p, tiles_of(c)) <= target.shared_memory_per_block,
                ),
                sensible(
                    default,
                    "16 keys a warp at least",
                    lambda c: int_(c, "num_warps") * 16 <= max(int_(c, "block_n"), 64),
                ),
            ),
        )

    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """``default_tiles``."""
        p = problem_of(node)
        tiles = self.tiles(p, target)
        assert tiles is not None, "what the template takes has a default"
        return config_of(replace(tiles, by_page=pages_are_looked_up(p, tiles)))

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel of a cut."""
        return paged_decode_source(problem_of(node), tiles_of(config), target)

    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """Keys and values once, of lengths as they are in the mean; partial results there and back.
        What a program walks is a split of the longest sequence.
        """
        p, tiles = problem_of(node), tiles_of(config)
        batch = evaluate(p.num_seqs, sizes)
        page, capacity = _room(node, sizes)
        context = longer = float(capacity)
        if not sizes.get(FULL):
            context = mean_length(page, capacity)
            longer = max(context, longest(batch, page, capacity))
        context, longer = (min(keys, p.window or keys) for keys in (context, longer))
        a_key = key_bytes(p)
        kv = batch * context * p.kv_heads * a_key
        splits = evaluate(num_splits(p, tiles, target), sizes)
        rows = batch * p.kv_heads * p.head_chunks
        used = min(splits, math.ceil(context / tiles.least / tiles.block_n))
        partial = 8.0 * rows * used * block_rows(p) * p.value_dim if used > 1 else 0.0
        resident = target.shared_memory_per_sm // (self.shared(p, tiles) + 1024)
        return Work(
            dram_bytes=kv,
            l2_bytes=kv + partial,
            flops=4.0 * rows * context * block_rows(p) * p.head_dim,
            dtype=str(node.dtype.torch).removeprefix("torch."),
            programs=rows * used,
            blocks_per_sm=max(1, min(resident, 2048 // (32 * tiles.num_warps))),
            bytes_in_flight=float(max(1, tiles.num_stages - 1) * tiles.block_n * a_key),
            steps=max(math.ceil(longer / splits / tiles.block_n), tiles.least),
            stages=tiles.num_stages,
            splits=splits,
            warps=tiles.num_warps,
        )

    def numerics(self, config: Config) -> str:
        """A split adds up tile by tile, so that tiles and where splits begin decide; in the end
        warps add up a row of weights between them. How keys are found and when they are asked for
        changes no bit.
        """
        tiles = tiles_of(config)
        return (
            f"block_n={tiles.block_n} waves={tiles.waves} least={tiles.least} "
            f"num_warps={tiles.num_warps}"
        )

    def contents(self, node: Node, sizes: Sizes, generator: torch.Generator, seed: int) -> Contents:
        """Random pages in random places, for sequences of mixed lengths or of full ones. Entries of
        the block table behind a sequence are 0, as a step has them.
        """
        device = generator.device
        tables, lens = node.operands[3], node.operands[4]
        pages, (page, capacity) = evaluate(node.operands[1].shape[0], sizes), _room(node, sizes)
        batch, width = (evaluate(size, sizes) for size in tables.shape)
        full = [capacity] * batch
        lengths = full if sizes.get(FULL) else mixed_lengths(batch, page, capacity, seed)

        def placed(shape: Sequence[int]) -> torch.Tensor:
            counts = torch.tensor([-(-length // page) for length in lengths], device=device)
            used = torch.arange(width, device=device) < counts[:, None]
            ids = torch.randperm(pages, generator=generator, device=device)
            value = torch.zeros(*shape, dtype=ids.dtype, device=device)
            value[used] = ids[: int(counts.sum())]
            return value

        made: dict[Node, Callable[[Sequence[int]], torch.Tensor]] = {
            tables: placed,
            lens: lambda _: torch.tensor(lengths, device=device),
        }
        return made | cached(node, generator)


def mixed_sizes(node: Node, sequences: int, capacity: int | None, page_size: int = 16) -> Sizes:
    """The symbols' values for a bucket of sequences of mixed lengths.

    Args:
        node: a call that the template takes.
        sequences: of the bucket.
        capacity: tokens of the longest sequence, ``max_model_len``; None: not known.
        page_size: where the node leaves it open.

    The cache has as many pages as the sequences need, 4 GB at most: a shorter context is measured
    instead of a larger one.
    """
    p, page = problem_of(node), _page(node, page_size)
    a_page = page * p.kv_heads * key_bytes(p)
    wanted = next((c for c in CAPACITIES if capacity is not None and capacity <= c), CAPACITIES[-1])
    rooms = [c for c in reversed(CAPACITIES) if c <= wanted]
    fitting = (c for c in rooms if most_pages(sequences, page, c) * a_page <= _MOST_BYTES)
    chosen = next(fitting, rooms[-1])
    return _sizes(node, sequences, page, chosen, most_pages(sequences, page, chosen))


def sizes_of(node: Node, batch: int, context: int, page_size: int = 16) -> Sizes:
    """The symbols' values for a batch of sequences of ``context`` tokens, in pages of their own."""
    page = _page(node, page_size)
    sizes = _sizes(node, batch, page, context, batch * -(-context // page))
    return {**sizes, FULL: 1}


def _sizes(node: Node, batch: int, page: int, context: int, pages: int) -> dict[str, int]:
    k_cache, tables, lens = node.operands[1], node.operands[3], node.operands[4]
    wanted = (
        (lens.shape[0], batch),
        (k_cache.shape[1], page),
        (tables.shape[1], -(-context // page)),
        (k_cache.shape[0], pages),
    )
    return {str(size): value for size, value in wanted if not isinstance(size, int)}


def _page(node: Node, otherwise: int) -> int:
    size = node.operands[1].shape[1]
    return size if isinstance(size, int) else otherwise


def _room(node: Node, sizes: Sizes) -> tuple[int, int]:
    """Tokens of a page, and of a row of the block table."""
    page = evaluate(node.operands[1].shape[1], sizes)
    return page, page * evaluate(node.operands[3].shape[1], sizes)


def problem_of(node: Node) -> Problem:
    """The problem of a call that the template takes."""
    found = Problem.of(node, layouts_of(node))
    assert found is not None, "asked of a call that the template takes"
    return found


def config_of(tiles: Tiles) -> Config:
    """A cut as the tuner has it."""
    names = [field.name for field in fields(Tiles) if field.name not in _FIXED]
    return Config(tuple((name, getattr(tiles, name)) for name in names))


def tiles_of(config: Config | Mapping[str, Value]) -> Tiles:
    """The cut of a config."""
    names = [field.name for field in fields(Tiles) if field.name not in _FIXED]
    return Tiles(**{name: config[name] for name in names})  # type: ignore[arg-type]

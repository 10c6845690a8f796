"""Paged decode attention for the tuner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

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
    fits,
    num_splits,
    pages_are_looked_up,
    shared_bytes,
)
from ..source import KernelSource
from .problem import bases_of, layouts_of
from .template import Facts, Sizes, Template, int_, power_range, sensible, with_default

_FIXED = ("fixed_split_keys",)  # what makes a Program deterministic is not tuned


class PagedDecode(Template):
    """The kernel for sequences of one token each. The sizes are the batch and, by the width of the
    block table, the context.
    """

    name = "paged_decode"
    constants = Constants(latency=7.09e-6, dram=1.32, overlap=3.12)
    modules = (paged_decode, paged_decode_kernel, paged_decode_tiles, paged_attention_tiles)

    def takes(self, node: Node) -> bool:
        """A ``paged_attention`` without ``query_start`` that the kernel computes."""
        if node.op != "paged_attention" or node.args[5] is not None:
            return False
        return Problem.of(node, layouts_of(node)) is not None

    def facts(self, node: Node, sizes: Sizes) -> Facts:
        """Heads, head dims, page, what is added to scores; batch and context."""
        p = problem_of(node)
        page = evaluate(node.operands[1].shape[1], sizes)
        further = ["sinks" if node.args[6] else "", "alibi" if node.args[7] else ""]
        further += ["softcap" if p.softcap is not None else ""]
        return (
            ("dtype", str(node.dtype)),
            ("with", " ".join(filter(None, further))),
            ("window", p.window or 0),
            ("heads", p.heads),
            ("kv_heads", p.kv_heads),
            ("head_dim", p.head_dim),
            ("value_dim", p.value_dim),
            ("page_size", page),
            ("sequences", evaluate(p.num_seqs, sizes)),
            ("context", page * evaluate(node.operands[3].shape[1], sizes)),
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
                    lambda c: fits(p, tiles_of(c), target),
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
        tiles = default_tiles(p, target)
        assert tiles is not None, "what the template takes has a default"
        return config_of(replace(tiles, by_page=pages_are_looked_up(p, tiles)))

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel of a cut."""
        return paged_decode_source(problem_of(node), tiles_of(config), target)

    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """Keys and values once; partial results there and back."""
        p, tiles = problem_of(node), tiles_of(config)
        batch, size = evaluate(p.num_seqs, sizes), node.dtype.bytes
        page = evaluate(node.operands[1].shape[1], sizes)
        context = min(page * evaluate(node.operands[3].shape[1], sizes), p.window or 1 << 30)
        a_key = (p.head_dim + p.value_dim) * size
        kv = float(batch * context * p.kv_heads * a_key)
        splits = evaluate(num_splits(p, tiles, target), sizes)
        rows = batch * p.kv_heads * p.head_chunks
        partial = 8.0 * rows * splits * block_rows(p) * p.value_dim if splits > 1 else 0.0
        resident = target.shared_memory_per_sm // (shared_bytes(p, tiles) + 1024)
        return Work(
            dram_bytes=kv,
            l2_bytes=kv + partial,
            flops=4.0 * rows * context * block_rows(p) * p.head_dim,
            dtype=str(node.dtype.torch).removeprefix("torch."),
            programs=rows * splits,
            blocks_per_sm=max(1, min(resident, 2048 // (32 * tiles.num_warps))),
            bytes_in_flight=float(max(1, tiles.num_stages - 1) * tiles.block_n * a_key),
            steps=-(-context // splits // tiles.block_n),
            stages=tiles.num_stages,
            warps=tiles.num_warps,
        )

    def numerics(self, config: Config) -> str:
        """Tiles of keys and their splits decide the order of sums."""
        names = ("block_n", "waves", "min_keys", "num_warps")
        return " ".join(f"{name}={config[name]}" for name in names)

    def operands(
        self, node: Node, sizes: Sizes, device: torch.device, seed: int
    ) -> Sequence[torch.Tensor | None]:
        """Random pages in random places; all sequences as long as the block table allows."""
        generator = torch.Generator(device).manual_seed(seed)
        made: dict[Node, torch.Tensor] = {}
        tables, lens = node.operands[3], node.operands[4]
        pages = evaluate(node.operands[1].shape[0], sizes)
        page = evaluate(node.operands[1].shape[1], sizes)
        for base in bases_of(node):
            if base is None or base in made:
                continue
            shape = [evaluate(size, sizes) for size in base.shape]
            if base is tables:
                ids = torch.randperm(pages, generator=generator, device=device)
                value = ids[: shape[0] * shape[1]].view(shape)
            elif base is lens:
                width = evaluate(tables.shape[1], sizes)
                value = torch.full(shape, page * width, device=device)
            else:
                value = torch.randn(shape, generator=generator, device=device)
            made[base] = value.to(base.dtype.torch)
        return [None if base is None else made[base] for base in bases_of(node)]


def sizes_of(node: Node, batch: int, context: int, page_size: int = 16) -> Sizes:
    """The symbols' values for a batch of sequences of ``context`` tokens, in pages of their own."""
    k_cache, tables, lens = node.operands[1], node.operands[3], node.operands[4]
    page = k_cache.shape[1] if isinstance(k_cache.shape[1], int) else page_size
    width = -(-context // page)
    wanted = (
        (lens.shape[0], batch),
        (k_cache.shape[1], page),
        (tables.shape[1], width),
        (k_cache.shape[0], batch * width),
    )
    return {str(size): value for size, value in wanted if not isinstance(size, int)}


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

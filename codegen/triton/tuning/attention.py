"""Paged attention over more tokens than sequences, prefill and mixed steps, for the tuner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from types import ModuleType

import torch

from ....autotune.prior import Constants, Work
from ....autotune.space import Boolean, Choice, Config, Constraint, Parameter, Space, Value
from ....ir.dims import evaluate
from ....ir.node import Node
from ....targets import Target
from ..kernels import (
    hopper_attention,
    hopper_attention_kernel,
    hopper_attention_loads,
    paged_attention,
    paged_attention_kernel,
    paged_attention_tiles,
    prefill_steps,
)
from ..kernels.hopper_attention import takes_tiles, why_not
from ..kernels.paged_attention import PAGE, prefill_source
from ..kernels.paged_attention_tiles import (
    SPACE,
    Problem,
    Tiles,
    block,
    shared_bytes,
)
from ..kernels.prefill_steps import USUAL, WHOLE, Steps, default_prefill, steps_at
from ..source import KernelSource
from .paged import cached, head_facts, key_bytes, scaled_facts
from .problem import layouts_of
from .template import Contents, Facts, Sizes, Template, int_, sensible, with_default

DECODES = "decodes"
"""Among sizes: how many sequences, the first ones, bring one token behind as many others as the
block table allows. The others share the rest.
"""

BEHIND = "behind"
"""Among sizes: how many tokens come before those of each of the others."""

_ROOM = 1024  # tokens of a sequence that decodes, with its own
_STEP_KEYS = 24  # what a step costs beside its products, in keys
# Parameters where the kernel of programs that stay takes the problem alone.
_STAY, _BOTH_WAYS = "programs", "both_ways"
_HIDDEN = 0.55  # of the plain kernel's time, on an H100
_REGISTERS = 160  # float32 values of sums, scores and weights that a thread may hold


class PagedAttention(Template):
    """The kernel for any mix of tokens, where they are more than the sequences.

    There is a problem for each kind of steps that has a cut of its own (`step_sizes`); where all
    have one, it is one sequence of 2048 tokens, all of them new. The kernel does not know the page
    size where the graph leaves it open; it is timed with 16.
    """

    name = "paged_attention"
    # Set by hand, until a space is measured: products and their steps decide, not what is on its
    # way.
    constants = Constants(tensor=0.554, tail=0.5, step=0.0, many_warps=0.0, few_warps=0.1)
    modules: tuple[ModuleType, ...] = (
        hopper_attention,
        hopper_attention_kernel,
        hopper_attention_loads,
        paged_attention,
        paged_attention_kernel,
        paged_attention_tiles,
        prefill_steps,
    )
    op = "paged_attention"

    def takes(self, node: Node) -> bool:
        """A call of the op with ``query_start`` that the kernel computes."""
        if node.op != self.op or node.args[5] is None:
            return False
        return Problem.of(node, layouts_of(node)) is not None

    def serves(self, node: Node, target: Target) -> bool:
        """Also some tile fits the target."""
        return self.takes(node) and self.tiles(problem_of(node), target, USUAL) is not None

    def tiles(self, problem: Problem, target: Target, steps: Steps) -> Tiles | None:
        """``default_prefill`` of the kernels."""
        return default_prefill(problem, target, steps)

    def shared(self, problem: Problem, tiles: Tiles) -> int:
        """``shared_bytes`` of the kernel."""
        return shared_bytes(problem, tiles)

    def facts(self, node: Node, sizes: Sizes) -> Facts:
        """Heads, head dims, page, what is added to scores and who sees whom; tokens, and who brings
        them.
        """
        p = problem_of(node)
        causal = "causal" if node.attr("causal") else ""
        return (
            *head_facts(p, causal),
            *scaled_facts(node),
            ("page_size", evaluate(node.operands[1].shape[1], sizes)),
            ("sequences", evaluate(p.num_seqs, sizes)),
            ("tokens", evaluate(p.num_tokens, sizes)),
            *((name, sizes[name]) for name in (DECODES, BEHIND) if sizes.get(name)),
        )

    def space(self, node: Node, sizes: Sizes, target: Target) -> Space:
        """Tiles, warps and stages; on Hopper, programs that stay, of the kernel for that."""
        p, default = problem_of(node), self.default(node, sizes, target)
        stays: tuple[Parameter, ...] = ()
        if default.get(_STAY) is not None:
            stays = (Choice(_STAY, (0, target.sms)), Boolean(_BOTH_WAYS))
        return Space(
            (*(with_default(n, v, int_(default, n)) for n, v in SPACE.items()), *stays),
            (
                Constraint(
                    "two groups of 64 rows where programs stay",
                    lambda c: not c.get(_STAY) or takes_tiles(p, tiles_of(c), target),
                ),
                Constraint(
                    "an end to begin at, where programs stay",
                    lambda c: bool(c.get(_STAY)) or not c.get(_BOTH_WAYS),
                ),
                Constraint(
                    "a row for each head of a group",
                    lambda c: int_(c, "block_m") >= block(p.chunk_heads),
                ),
                Constraint(
                    "what the block's shared memory holds",
                    lambda c: self.shared(p, tiles_of(c)) <= target.shared_memory_per_block,
                ),
                sensible(
                    default,
                    "16 rows a warp, or 16 keys, at least",
                    lambda c: (
                        16 * int_(c, "num_warps") <= max(int_(c, "block_m"), int_(c, "block_n"))
                    ),
                ),
                sensible(
                    default,
                    "sums and scores that registers hold",
                    lambda c: _held(p, tiles_of(c)) <= _REGISTERS,
                ),
            ),
        )

    def default(self, node: Node, sizes: Sizes, target: Target) -> Config:
        """``default_prefill``, of the steps that these are among."""
        p = problem_of(node)
        tiles = self.tiles(p, target, steps_at(p, target, sizes))
        assert tiles is not None, "what the template takes has a default"
        if why_not(p, target) is None:
            return config_of(tiles)
        return Config(tuple((name, getattr(tiles, name)) for name in SPACE))

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel with this one cut."""
        return prefill_source(problem_of(node), tiles_of(config))

    def work(self, node: Node, config: Config, sizes: Sizes, target: Target) -> Work:
        """Queries, keys, values and results once; keys and values, as far as they are seen, by
        every block of rows.
        """
        p, tiles = problem_of(node), tiles_of(config)
        tokens, size = evaluate(p.num_tokens, sizes), node.dtype.bytes
        a_block = tiles.block_m // p.chunk_heads
        steps = lengths_of(node, sizes)
        seen = [
            _tiles_seen(p, tiles, before + first, before + now)
            for before, now in steps
            for first in range(0, now, a_block)
        ]
        blocks, keys = len(seen), sum(map(sum, steps))
        groups = p.kv_heads * p.head_chunks
        dims = p.head_dim + p.value_dim
        padded = block(p.head_dim) + block(p.value_dim)
        q_and_out = tokens * p.heads * dims * size
        walked = groups * sum(seen) * tiles.block_n * key_bytes(p)
        resident = target.shared_memory_per_sm // (self.shared(p, tiles) + 1024)
        return Work(
            dram_bytes=float(q_and_out + keys * p.kv_heads * key_bytes(p)),
            l2_bytes=float(q_and_out + walked),
            flops=2.0 * groups * sum(seen) * tiles.block_m * (tiles.block_n + _STEP_KEYS) * padded,
            dtype=str(node.dtype.torch).removeprefix("torch."),
            programs=blocks * groups,
            blocks_per_sm=max(1, min(resident, 2048 // (32 * tiles.num_warps))),
            bytes_in_flight=float(max(1, tiles.num_stages - 1) * tiles.block_n * key_bytes(p)),
            steps=math.ceil(sum(seen) / blocks),
            stages=tiles.num_stages,
            warps=tiles.num_warps,
            accumulators=_held(p, tiles),
        )

    def prior(self, node: Node, config: Config, sizes: Sizes, target: Target) -> float:
        """Products of the kernel whose programs stay hide its weights, which others wait for."""
        seconds = super().prior(node, config, sizes, target)
        return seconds * _HIDDEN if config.get(_STAY) else seconds

    def numerics(self, config: Config) -> str:
        """A row adds up its tiles of keys one after the other; rows and warps decide which
        instruction multiplies, and between whom a row of weights is added up.
        """
        deciding = ("block_m", "block_n", "num_warps", _STAY)
        return " ".join(f"{n}={config[n]}" for n in deciding if config.get(n))

    def contents(self, node: Node, sizes: Sizes, generator: torch.Generator, seed: int) -> Contents:
        """Random pages in random places, for sequences as ``lengths_of`` has them."""
        device = generator.device
        tables, lens, starts = node.operands[3:6]
        pages = evaluate(node.operands[1].shape[0], sizes)
        steps = lengths_of(node, sizes)
        begins = torch.tensor([0, *(now for _, now in steps)]).cumsum(0)

        def placed(shape: Sequence[int]) -> torch.Tensor:
            ids = torch.randperm(pages, generator=generator, device=device)
            return ids[: shape[0] * shape[1]].view(*shape)

        made: dict[Node, Callable[[Sequence[int]], torch.Tensor]] = {
            tables: placed,
            lens: lambda _: torch.tensor([sum(step) for step in steps], device=device),
            starts: lambda _: begins.to(device),
        }
        return made | cached(node, generator)


def lengths_of(node: Node, sizes: Sizes) -> list[tuple[int, int]]:
    """What sequences of a timed step have seen, and bring, in tokens: those that decode come first,
    and behind these the others share the tokens evenly.
    """
    tables, lens = node.operands[3:5]
    tokens, batch = (evaluate(x.shape[0], sizes) for x in (node.operands[0], lens))
    room = evaluate(tables.shape[1], sizes) * evaluate(node.operands[1].shape[1], sizes)
    decodes, behind = sizes.get(DECODES, 0), sizes.get(BEHIND, 0)
    count, rest = batch - decodes, tokens - decodes
    shares = [rest * (i + 1) // count - rest * i // count for i in range(count)]
    return [(room - 1, 1)] * decodes + [(behind, share) for share in shares]


def step_sizes(node: Node, steps: Steps) -> Sizes:
    """The symbols' values for the step that a kind of them is timed as."""
    count = steps.sequences - steps.decodes
    room = steps.behind + -(-(steps.tokens - steps.decodes) // count)
    room = max(room, _ROOM) if steps.decodes else room
    told = {DECODES: steps.decodes, BEHIND: steps.behind}
    sizes = _sizes(node, steps.tokens, steps.sequences, room)
    return sizes | {name: value for name, value in told.items() if value}


def prefill_sizes(node: Node, tokens: int = WHOLE.tokens) -> Sizes:
    """The symbols' values for one sequence of so many tokens, all of them new."""
    return _sizes(node, tokens, 1, tokens)


def _sizes(node: Node, tokens: int, sequences: int, room: int) -> dict[str, int]:
    q, k_cache, tables, lens = (node.operands[index] for index in (0, 1, 3, 4))
    page = k_cache.shape[1] if isinstance(k_cache.shape[1], int) else PAGE
    pages = math.ceil(room / page)
    wanted = (
        (q.shape[0], tokens),
        (lens.shape[0], sequences),
        (k_cache.shape[1], page),
        (tables.shape[1], pages),
        (k_cache.shape[0], pages * sequences),
    )
    return {str(size): value for size, value in wanted if not isinstance(size, int)}


def problem_of(node: Node) -> Problem:
    """The problem of a call that the template takes."""
    found = Problem.of(node, layouts_of(node))
    assert found is not None, "asked of a call that the template takes"
    return found


def config_of(tiles: Tiles) -> Config:
    """A cut as the tuner has it."""
    return Config(tuple(asdict(tiles).items()))


def tiles_of(config: Config | Mapping[str, Value]) -> Tiles:
    """The cut of a config."""
    given = (field.name for field in fields(Tiles) if config.get(field.name) is not None)
    return Tiles(**{name: config[name] for name in given})  # type: ignore[arg-type]


def _tiles_seen(problem: Problem, tiles: Tiles, first: int, length: int) -> int:
    """Tiles of keys that a block of rows walks, whose first token is ``first`` of the sequence."""
    high, low = length, 0
    if problem.node.attr("causal"):
        high = min(length, first + tiles.block_m // problem.chunk_heads)
    if problem.window is not None:
        low = max(first - problem.window + 1, 0)
    return math.ceil(high / tiles.block_n) - low // tiles.block_n


def _held(problem: Problem, tiles: Tiles) -> float:
    """Float32 sums, scores and weights that a thread has at once."""
    columns = block(problem.value_dim) + 1.5 * tiles.block_n
    return tiles.block_m * columns / (32 * tiles.num_warps)

"""Which steps have a cut of prefill attention of their own, where Hopper's kernel takes the call.

What a Program knows of a step is its tokens T and its sequences B, both padded (step_graphs.py):
how many sequences bring one token, and what came before, no size tells (the block table is as wide
as the engine's longest sequence). So steps are told apart by T and B alone, and a cut has to be
good for whatever they may be::

    mixed   T < 128 (B - 1)     rows of decodes beside prompts: memory and products at once
    few     T <= 512            a short prompt, or the end of one behind thousands of keys
    long    T >= 2048 B         long prompts, and chunks of longer ones: products decide
    usual   all others          some prompts

On an H100, 32 heads over 8 (us; benchmarks/NOTES.md), of heads of 128 / of 64, the best by a star:

| | plain | 64 keys | both ways | 128 keys |
|---|--:|--:|--:|--:|
| 128 tokens | *6.3 / *4.9 | 9.0 / | 8.9 / 8.1 | 9.3 / 8.2 |
| 512 | 15.9 / *10.7 | 15.3 / | *14.7 / 12.4 | 15.7 / 12.8 |
| 128 behind 8064 | 214 / 114 | 122 / | *122 / *97 | 124 / *97 |
| 512 behind 7680 | *207 / *110 | 238 / | 229 / 181 | 237 / 168 |
| 2048 | 121 / | *78.9 / | 79.6 / | 82.1 / |
| 2048 behind 6144 | 625 / | 490 / | 480 / | *432 / |
| 8 x 1024 | 270 / | *185 / | 191 / | 199 / |
| 1024 x 8 and 120 decodes | 437 / | 350 / | *319 / | 354 / |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ....ir.dims import Size, evaluate, is_nonnegative
from ....targets import Target
from .hopper_attention import default_hopper, why_not
from .paged_attention_tiles import PREFILL, Problem, Tiles, default_tiles

MIXED = 128
"""Tokens of a sequence but the first, in the mean, below which most may be rows of decodes."""

FEW = 512
"""Tokens for which a program is left alone with a tile of rows."""

LONG = 2048
"""Tokens of a sequence, in the mean, from which there may be as many before them."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps whose attention is cut alike.

    Attributes:
        name: for people.
        tokens, sequences: of the step that they are timed as.
        decodes: how many of its sequences bring one token.
        behind: tokens before those of each sequence that brings more.
        spare: of T and B, what is at least 0 in these steps, where none of those before is meant.
    """

    name: str
    tokens: int
    sequences: int = 1
    decodes: int = 0
    behind: int = 0
    spare: Callable[[Size, Size], Size] = lambda t, b: 0


WHOLE = Steps("all", 2048)
"""Of a kernel with one cut for all steps."""

USUAL = Steps("usual", 4096, 8)
KINDS = (
    Steps("mixed", 2078, 32, decodes=30, spare=lambda t, b: MIXED * (b - 1) - 1 - t),
    Steps("few", 256, behind=768, spare=lambda t, b: FEW - t),
    Steps("long", 2048, behind=2048, spare=lambda t, b: t - LONG * b),
    USUAL,
)
"""In the order in which they are asked; the last takes what is left."""

_PLAIN: Mapping[int, Tiles] = {64: Tiles(64, 128, 4, 2)}
"""By head dim, of the plain kernel in steps that it is the quicker one for."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one cut computes: the steps for which all of ``guard`` are at least 0, and that no share
    before it takes.
    """

    tiles: Tiles
    guard: tuple[Size, ...] = ()


def steps_of(problem: Problem, target: Target) -> tuple[Steps, ...]:
    """The steps that have a cut of their own, in order; the last takes what is left."""
    if why_not(problem, target) is not None:
        return (WHOLE,)
    found = []
    for steps in KINDS:
        spare = steps.spare(problem.num_tokens, problem.num_seqs)
        if is_nonnegative(-1 - spare):
            continue
        found.append(steps)
        if is_nonnegative(spare):
            break
    return tuple(found)


def steps_at(problem: Problem, target: Target, sizes: Mapping[str, int]) -> Steps:
    """The steps that those of given sizes are among."""
    tokens, sequences = (evaluate(s, sizes) for s in (problem.num_tokens, problem.num_seqs))
    found = (s for s in steps_of(problem, target) if evaluate(s.spare(tokens, sequences), {}) >= 0)
    return next(found)


def default_prefill(problem: Problem, target: Target, steps: Steps = USUAL) -> Tiles | None:
    """The cut of prefill at some steps without tuning: of Hopper's kernel where it takes the call
    and is the quicker one, else the plain kernel's; None where none fits.
    """
    if why_not(problem, target) is None:
        tiles = default_hopper(problem, target, steps.name) or _PLAIN.get(problem.head_dim)
        if tiles is not None:
            return tiles
    return default_tiles(problem, target, PREFILL)


def shares_of(
    problem: Problem, target: Target, cut: Callable[[Steps], Tiles | None]
) -> Sequence[Share]:
    """The shares of a problem; the last has no guard. ``cut`` says what was tuned for, None for the
    default. Those that end up with the last one's cut are part of it.
    """
    kinds = steps_of(problem, target)
    found: list[Share] = []
    for steps in kinds:
        tiles = cut(steps) or default_prefill(problem, target, steps)
        assert tiles is not None, "asked of a problem that some tile fits"
        found.append(Share(tiles, (steps.spare(problem.num_tokens, problem.num_seqs),)))
    last = found.pop().tiles
    while found and found[-1].tiles == last:
        found.pop()
    return (*found, Share(last))

"""Which steps have a cut of prefill attention of their own, where Hopper's kernel takes the call.

What a Program knows of a step is its tokens T and its sequences B, both padded (step_graphs.py):
how many sequences bring one token, and how long what came before is, no size tells (the block table
is as wide as the longest sequence of the engine). So steps are told apart by T and T / B::

    few     T <= 384            one row of tiles a head: what a launch costs decides
    long    T >= 4096 B         prompts and chunks that are long: products decide
    mixed   T < 128 B           rows of decodes beside prompts: memory and products at once
    usual   all others
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ....ir.dims import Size, evaluate, is_nonnegative
from ....targets import Target
from .hopper_attention import default_hopper, why_not
from .paged_attention_tiles import PREFILL, Problem, Tiles, default_tiles

FEW_TOKENS = 384
"""On an H100, 32 heads of 128, the plain kernel takes 5.4 and 8.9 us for 128 and 256 tokens, the
other one 8.9 and 10.9; for 512 they take 15.5 and 14.6.
"""

LONG = 4096
"""Tokens of a sequence, in the mean, from which 128 keys a tile are quicker than 64: 935 us against
966 for 8192.
"""

MIXED = 128
"""Tokens of a sequence, in the mean, below which most sequences may be rows of decodes."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps whose attention is cut alike.

    Attributes:
        name: for people.
        tokens, sequences: of the step that they are timed as.
        decodes: how many of its sequences bring one token.
        spare: of T and B, what is at least 0 in these steps, where none of those before is meant.
    """

    name: str
    tokens: int
    sequences: int = 1
    decodes: int = 0
    spare: Callable[[Size, Size], Size] = lambda t, b: 0


USUAL = Steps("usual", 2048)
KINDS = (
    Steps("few", 256, spare=lambda t, b: FEW_TOKENS - t),
    Steps("long", 4096, spare=lambda t, b: t - LONG * b),
    Steps("mixed", 2078, 32, 30, spare=lambda t, b: MIXED * b - 1 - t),
    USUAL,
)
"""In the order in which they are asked; the last takes what is left."""


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
        return (USUAL,)
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
    found = (s for s in steps_of(problem, target) if _is_among(s, tokens, sequences))
    return next(found, USUAL)


def _is_among(steps: Steps, tokens: int, sequences: int) -> bool:
    spare = steps.spare(tokens, sequences)
    assert isinstance(spare, int)
    return spare >= 0


def default_prefill(problem: Problem, target: Target, steps: Steps = USUAL) -> Tiles | None:
    """The cut of prefill at some steps without tuning: of Hopper's kernel where it takes the
    problem and is the faster one, else the plain kernel's; None where none fits.
    """
    plain = default_tiles(problem, target, PREFILL)
    if steps.name == "few":
        return plain
    return default_hopper(problem, target, long=steps.name == "long") or plain


def shares_of(
    problem: Problem, target: Target, cut: Callable[[Steps], Tiles | None]
) -> Sequence[Share]:
    """The shares of a problem, neighbours of one cut as one; the last has no guard. ``cut`` says
    what was tuned for, None for the default.
    """
    found: list[Share] = []
    kinds = steps_of(problem, target)
    for steps in kinds:
        tiles = cut(steps) or default_prefill(problem, target, steps)
        assert tiles is not None, "asked of a problem that some tile fits"
        last = steps is kinds[-1]
        guard = () if last else (steps.spare(problem.num_tokens, problem.num_seqs),)
        if last:
            while found and found[-1].tiles == tiles:
                found.pop()
        found.append(Share(tiles, guard))
    return found

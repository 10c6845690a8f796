"""The lines of a generated kernel: one a value, in one tile or in passes over chunks of a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Reduction = Literal["sum", "max", "min", "prod"]

# How two partial results of a chunked row join, and how a tile of them becomes one a row.
_JOIN = {
    "sum": "{0} + {1}",
    "max": "tl.maximum({0}, {1})",
    "min": "tl.minimum({0}, {1})",
    "prod": "{0} * {1}",
}
_FINISH = {
    "sum": "tl.sum({0}, 1, keep_dims=True)",
    "max": "tl.max({0}, 1, keep_dims=True)",
    "min": "tl.min({0}, 1, keep_dims=True)",
    "prod": "tl.reduce({0}, 1, _multiply, keep_dims=True)",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One variable, or one store.

    Attributes:
        name: of the variable; "" for a store.
        text: what it is set to, the statement of a store, or the tile that is reduced.
        uses: names of the variables in the text.
        cols: whether it varies with the column, so that it is made anew in each chunk.
        reduction: how the tile is reduced along the width, None where it is not.
        start: for a reduction the tile that changes nothing, as text.
        load: whether it only reads memory.
    """

    name: str
    text: str
    uses: tuple[str, ...] = ()
    cols: bool = True
    reduction: Reduction | None = None
    start: str = ""
    load: bool = False


def in_one_tile(steps: Sequence[Step]) -> Iterator[str]:
    """The lines where a program holds whole rows. Loads come first: memory is slow, and a reduction
    would hold up those behind it.
    """
    early = {s.name for s in steps if s.load and not s.uses}
    for step in sorted(steps, key=lambda s: s.name not in early or not s.name):
        if step.reduction:
            yield f"{step.name} = {_FINISH[step.reduction].format(step.text)}"
        else:
            yield _line(step)


def in_chunks(steps: Sequence[Step], width: str, columns: Sequence[str]) -> Iterator[str]:
    """The lines where a program walks its rows chunk by chunk: one pass for each level of
    reductions, each of which makes anew what it needs of the chunk.

    Args:
        steps: in order.
        width: of the rows, as text.
        columns: the lines that define the columns of the chunk at ``start``.
    """
    levels = _levels(steps)
    for level in range(max(levels.values()) + 1):
        here = [step for step in steps if levels[step] == level]
        yield from (_line(s) for s in here if not s.cols and s.reduction is None)
        reduced = [step for step in here if step.reduction]
        wanted = [*reduced, *(s for s in here if not s.name and s.cols)]
        for step in reduced:
            yield f"{step.name} = {step.start}"
        if wanted:
            yield f"for start in range(0, {width}, COLUMNS):"
            body = [*columns, *(_in_loop(step) for step in _needed(steps, wanted))]
            yield from (f"    {line}" for line in body)
        for step in reduced:
            assert step.reduction is not None
            yield f"{step.name} = {_FINISH[step.reduction].format(step.name)}"


def _line(step: Step) -> str:
    return f"{step.name} = {step.text}" if step.name else step.text


def _in_loop(step: Step) -> str:
    if step.reduction is None:
        return _line(step)
    return f"{step.name} = {_JOIN[step.reduction].format(step.name, step.text)}"


def _levels(steps: Sequence[Step]) -> dict[Step, int]:
    """The pass in which each step can first run: one behind the reductions that it reads."""
    found: dict[str, tuple[Step, int]] = {}
    levels: dict[Step, int] = {}
    for step in steps:
        sources = (found[name] for name in step.uses)
        levels[step] = max((n + (s.reduction is not None) for s, n in sources), default=0)
        found[step.name] = (step, levels[step])
    return levels


def _needed(steps: Sequence[Step], wanted: Iterable[Step]) -> list[Step]:
    """The steps of a chunk that lead to the wanted ones, these included, in order."""
    by_name = {step.name: step for step in steps if step.name}
    kept = set(wanted)
    pending = list(kept)
    while pending:
        for name in pending.pop().uses:
            step = by_name[name]
            if step.cols and step.reduction is None and step not in kept:
                kept.add(step)
                pending.append(step)
    return [step for step in steps if step in kept]

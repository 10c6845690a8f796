"""One launch beside the separate kernels of a decode Program: which steps take which. Needs no
Triton, as starting an engine does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ...errors import UnsupportedError
from ...ir.dims import Size
from ..program import Call, Program

PERSISTENT_PREFIX = "triton/persistent/"
"""How Programs name one launch for all layers, before its package's id."""


def beside(program: Program, launches: Sequence[Call], batches: Sequence[int]) -> tuple[Call, ...]:
    """The Program's calls with the launches in front of those behind the logits: each of the others
    is made where there are other numbers of sequences.

    Args:
        program: of separate kernels.
        launches: a call for each of ``batches``, which are numbers of sequences.

    Raises:
        UnsupportedError: a call behind the logits that needs more than these and inputs.
    """
    batch, made = program.buffers["token_ids"].shape[0], program.calls
    others = _others(batch, batches)
    logits = launches[0].results[0]
    last = max(i for i, call in enumerate(made) if logits in call.results)
    found = []
    for call in made[: last + 1]:
        is_constant = not call.operands and not call.constants and not call.guard
        found.append(call if is_constant else replace(call, guard=(*call.guard, others)))
    for call, number in zip(launches, batches, strict=True):
        exactly = (number - batch,) if number == 1 else (number - batch, batch - number)
        found.append(replace(call, guard=exactly))
    given = {*program.inputs, *program.weights, *launches[0].results}
    for call in made[last + 1 :]:
        if not _known(call.operands) <= given:
            raise UnsupportedError(
                f"one launch for all layers: {call.kernel} behind the logits",
                expected="a call of logits and inputs",
                found=f"operands {', '.join(sorted(_known(call.operands) - given))}",
                remedy="Its decode steps run as a graph of separate kernels.",
            )
        given |= {*call.results}
    return (*found, *made[last + 1 :])


def _others(batch: Size, batches: Sequence[int]) -> Size:
    """At least 0 where there are other numbers of sequences."""
    if tuple(batches) == (1,):
        return batch - 2
    found: Size = 1
    for number in batches:
        found = found * ((batch - number) * (batch - number))
    return found - 1


def launches_of(program: Program) -> list[Call]:
    """Its launches for all layers."""
    return [call for call in program.calls if call.kernel.startswith(PERSISTENT_PREFIX)]


def multiprocessors(program: Program) -> int:
    """That its launches occupy; 0 where it has none."""
    return max((int(str(call.attrs["programs"])) for call in launches_of(program)), default=0)


def without_launches(program: Program) -> Program:
    """The Program with its separate kernels for all steps: what `beside` was given."""
    launches = launches_of(program)
    batches = [int(str(call.attrs.get("batch", 1))) for call in launches]
    others = _others(program.buffers["token_ids"].shape[0], batches)
    calls = [
        replace(call, guard=call.guard[:-1]) if call.guard[-1:] == (others,) else call
        for call in program.calls
        if call not in launches
    ]
    return replace(program, calls=tuple(calls))


def _known(operands: Iterable[str | None]) -> set[str]:
    return {name for name in operands if name is not None}

"""The library as one config more in the space of a template of ours: what it is called, which calls
it stands for, and how long they should take.

A space has a parameter ``candidate`` before all others, which apply to "triton" alone. So "library"
is one config, which the tuner always tries, and which wins or loses like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ....autotune.space import Choice, Config, Constraint, Parameter, Space, Value, When
from ....ir.dims import evaluate
from ....ir.graph import Graph
from ....targets import Target
from ..kernels.linear_tiles import Problem
from ..lowering import lower_graph
from ..unfused import unfused
from .problem import call_of
from .template import Calls, Sizes

CANDIDATE, TRITON, LIBRARY = "candidate", "triton", "library"

_SHARE = 0.8
"""Of the roofline, what cuBLAS reaches with few tokens: on an H100 it reads the weights of an 8B
model at 0.6 to 0.9 of the device's rate."""

_LAUNCH = 2.5e-6
"""Seconds that a kernel more takes, which begins when the one before it has ended."""


def beside_library(space: Space) -> Space:
    """A template's space with the library's config behind its own."""
    ours = When(CANDIDATE, (TRITON,))
    return Space(
        (
            Choice(CANDIDATE, (TRITON, LIBRARY)),
            *(_only(parameter, ours) for parameter in space.parameters),
        ),
        tuple(
            Constraint(constraint.reason, _or_library(constraint.holds))
            for constraint in space.constraints
        ),
    )


def of_ours(values: Mapping[str, Value]) -> Config:
    """A cut of ours as a config of such a space."""
    return Config(((CANDIDATE, TRITON), *values.items()))


def library_config(space: Space) -> Config:
    """The one config of the library."""
    return Config(tuple((name, LIBRARY if name == CANDIDATE else None) for name in space.names))


def is_library(config: Config | Mapping[str, Value]) -> bool:
    """Whether a config is the library's."""
    return config.get(CANDIDATE) == LIBRARY


def separate_calls(graph: Graph, target: Target) -> Calls | None:
    """The Program of a problem as calls of its own around the library's, and the kernels that it
    needs; None where the library does not take the product, or generated kernels the rest.
    """
    found = unfused(call_of(graph), target)
    if found is None:
        return None
    alone = replace(graph, outputs=(found.parts[-1][1],))
    program, sources, _ = lower_graph(alone, target, joins=False)
    own = all(call.loader == "triton" for call in program.calls)
    return (program, sources) if own else None


def library_seconds(problem: Problem, sizes: Sizes, target: Target) -> float:
    """Seconds of those calls, roughly: weights once and every value between two calls there and
    back, at the library's share of the roofline, and a launch for each call behind the first.
    """
    p = problem
    tokens, size = evaluate(p.tokens, sizes), p.linear.dtype.bytes
    columns, calls = p.n * p.parts, 1 + (p.norm is not None) + bool(p.members)
    between = 2 * p.k * (p.norm is not None) + 2 * columns * bool(p.members)
    moved = size * (columns * p.k + tokens * (p.k + p.n + between))
    dtype = str(p.linear.dtype.torch).removeprefix("torch.")
    seconds = target.roofline_seconds(2.0 * tokens * columns * p.k, moved, dtype)
    return seconds / _SHARE + _LAUNCH * (calls - 1)


def _only(parameter: Parameter, when: When) -> Parameter:
    assert parameter.when is None, "one condition a parameter"
    return replace(parameter, when=when)


def _or_library(
    holds: Callable[[Mapping[str, Value]], bool],
) -> Callable[[Mapping[str, Value]], bool]:
    def of_either(values: Mapping[str, Value]) -> bool:
        own = {name: value for name, value in values.items() if name != CANDIDATE}
        return is_library(values) or holds(own)

    return of_either

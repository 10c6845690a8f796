"""What a boolean mask [..., S, L] says: which keys j each query i sees, read from comparisons
of indices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..ir.build import make
from ..ir.dims import Size, is_nonnegative
from ..ir.node import Node
from .affine import Affine, affine
from .match import value_of


@dataclass(frozen=True, slots=True)
class Visibility:
    """Key j is visible to query i when ``j <= i`` (causal), ``i - j < window``, and all
    ``rest`` are true.

    Positions count from the end: the S queries are the last of the L positions, as in the
    attention op.
    """

    causal: bool = False
    window: int | None = None
    rest: tuple[Node, ...] = ()

    def both(self, other: Visibility) -> Visibility:
        """What both let through."""
        windows = [w for w in (self.window, other.window) if w is not None]
        rest = tuple(dict.fromkeys((*self.rest, *other.rest)))
        return Visibility(self.causal or other.causal, min(windows, default=None), rest)


def visibility(conditions: Sequence[Node], scores: tuple[Size, ...]) -> Visibility:
    """The conjunction of boolean masks that broadcast to ``scores`` [..., S, L]."""
    found = Visibility()
    for condition in conditions:
        for part in _conjuncts(condition):
            found = found.both(_read(part, scores))
    return found


def conjunction(conditions: Sequence[Node]) -> Node:
    """All of ``conditions`` (at least one) as one node."""
    result = conditions[0]
    for condition in conditions[1:]:
        result = make("logical_and", result, condition)
    return result


def _conjuncts(condition: Node) -> Iterator[Node]:
    stack = [condition]
    while stack:
        node = stack.pop()
        widened = node.op in ("expand", "reshape")
        inner = node.operands[0] if widened else node
        leading = inner.shape == node.shape[node.type.rank - inner.type.rank :]
        if node.op == "logical_and":
            stack += node.operands[::-1]
        elif node.op == "expand" or (node.op == "reshape" and leading):
            stack.append(inner)
        else:
            yield node


def _read(condition: Node, scores: tuple[Size, ...]) -> Visibility:
    if value_of(condition) is True:
        return Visibility()
    margin = _margin(condition)
    if margin is None or any(axis not in (-1, -2) for axis in margin.factors):
        return Visibility(rest=(condition,))
    across, down = margin.factor(-1), margin.factor(-2)
    ahead = scores[-1] - scores[-2]  # positions before the first query
    match across, down:
        case -1, 1 if margin.constant == ahead:
            return Visibility(causal=True)
        case 1, -1:
            window = margin.constant + 1 + ahead
            if isinstance(window, int) and window >= 1:
                return Visibility(window=window)
    if all(is_nonnegative(s) for s in (across, down, margin.constant)):
        return Visibility()
    return Visibility(rest=(condition,))


def _margin(condition: Node) -> Affine | None:
    """The affine m for which an integer comparison says ``m >= 0``."""
    if condition.op not in ("le", "lt", "ge", "gt"):
        return None
    a, b = (affine(operand) for operand in condition.operands)
    if a is None or b is None:
        return None
    margin = b.plus(a, -1) if condition.op in ("le", "lt") else a.plus(b, -1)
    return margin if condition.op in ("le", "ge") else margin.plus(Affine({}, 1), -1)

"""Quotients that somebody rounds: there the last bit decides, and x / 41 is not x * (1 / 41)."""

from __future__ import annotations

from ..ir.graph import Graph
from ..ir.node import Node
from .match import value_of

STEPS = frozenset({"floor", "ceil", "round", "floordiv", "remainder", "sign"})
_COMPARE = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_CARRIERS = frozenset(
    {"reshape", "expand", "permute", "slice", "concat", "where", "maximum", "minimum"}
    | {"add", "sub", "mul", "neg", "abs", "cast"}
)
_REACH = 6  # ops between a quotient and its rounding


def stepped_divisors(graph: Graph) -> frozenset[float]:
    """The constants that values which are rounded, or compared, have been divided by."""
    found: set[float] = set()
    frontier = {o for node in graph.nodes if _steps(node) for o in node.operands}
    for _ in range(_REACH):
        found |= {value for node in frontier if (value := _divisor(node)) is not None}
        frontier = {o for node in frontier if node.op in _CARRIERS for o in node.operands}
    return frozenset(found)


def _steps(node: Node) -> bool:
    """Whether the result jumps where a float operand moves by its last bit."""
    if not any(operand.dtype.is_float for operand in node.operands if len(operand.types) == 1):
        return False
    return node.op in STEPS | _COMPARE or (node.op == "cast" and not node.dtype.is_float)


def _divisor(node: Node) -> float | None:
    value = value_of(node.operands[1]) if node.op == "div" else None
    return None if value is None else float(value)

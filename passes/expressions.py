"""The weights of a graph as what passes may build upon: load-time expressions."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import GraphError
from ..formats.weights import Weight
from ..ir.graph import Graph


def expression_of(graph: Graph, name: str) -> Weight:
    """The expression of a param (formats/weights.py).

    Raises:
        GraphError: its value comes from elsewhere; ``ir`` asks only that it can be loaded.
    """
    weight = graph.weights[name]
    if not isinstance(weight, Weight):
        raise GraphError(
            f"weight {name!r} of {graph.name}",
            expected="an expression over stored or held tensors",
            found=type(weight).__name__,
            remedy="Hold the tensor with formats.Held.",
        )
    return weight


def expressions(graph: Graph, names: Iterable[str] | None = None) -> dict[str, Weight]:
    """Those of the named params, by default of all."""
    return {
        name: expression_of(graph, name) for name in (graph.weights if names is None else names)
    }

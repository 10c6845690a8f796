"""Weights exchanged for parts: a quantized weight is codes, scales, and an expression over both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ..errors import GraphError
from .build import param, rebuild
from .dtypes import DType
from .graph import Graph, Weight, param_name
from .node import Node
from .types import TensorType


@dataclass(frozen=True, slots=True)
class Swap:
    """What stands for a param.

    Attributes:
        parts: weights by suffix; ``x.weight`` and ``scale`` make the param ``x.weight.scale``.
        expr: the value, of the param's type, from the params of the parts by suffix.
        readers: the nodes that read the value; None for all that read the param.
    """

    parts: Mapping[str, Weight]
    expr: Callable[[Mapping[str, Node]], Node]
    readers: Collection[Node] | None = None


def replace_params(graph: Graph, swaps: Mapping[str, Swap]) -> Graph:
    """The graph with params exchanged, all in one sweep; weights that nothing reads are dropped.

    Raises:
        GraphError: no param of a name, a part whose name is taken, or a value of another type.
    """
    olds = {param_name(node): node for node in graph.params}
    weights: dict[str, Weight] = {}
    stands: dict[Node, Node] = {}
    for name, swap in swaps.items():
        if name not in olds:
            raise _wrong(name, f"one of {', '.join(sorted(olds))}", "no such param")
        parts = {}
        for suffix, weight in swap.parts.items():
            full = f"{name}.{suffix}"
            if full in graph.weights:
                raise _wrong(full, "a name for a part that is not taken", "a weight of that name")
            weights[full] = weight
            shape = tuple(weight.shape)
            parts[suffix] = param(full, TensorType(DType.from_torch(weight.dtype), shape))
        value = swap.expr(parts)
        if value.value_type != olds[name].value_type:
            raise _wrong(name, f"a value {olds[name].type}", str(value.value_type))
        stands[olds[name]] = value
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        here = {o: stands[o] for o in node.operands if o in stands and _reads(node, swaps, o)}
        values[node] = rebuild(node, {**values, **here} if here else values)
    outputs = tuple(values[output] for output in graph.outputs)
    return graph.with_weights(weights).with_outputs(outputs)


def _reads(node: Node, swaps: Mapping[str, Swap], old: Node) -> bool:
    readers = swaps[param_name(old)].readers
    return readers is None or node in readers


def _wrong(name: str, expected: str, found: str) -> GraphError:
    return GraphError(
        f"param {name!r}",
        expected=expected,
        found=found,
        remedy="Correct the scheme that replaces it.",
    )

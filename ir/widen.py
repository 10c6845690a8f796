"""A graph over a wider floating-point type: a reference whose own rounding does not count."""

from __future__ import annotations

from .build import make
from .dtypes import DType
from .graph import Graph
from .node import Attr, Node
from .types import TensorType


def widened(graph: Graph, dtype: DType) -> Graph:
    """The same ops over ``dtype`` in place of every narrower floating-point type but those of codes
    (8-bit floats), in bodies too. Whoever runs it casts inputs and weights to what params declare.
    """

    def wide(found: DType) -> DType:
        narrower = found.is_float and not found.is_float8 and found.bytes < dtype.bytes
        return dtype if narrower else found

    def attr(value: Attr) -> Attr:
        if isinstance(value, Graph):
            return widened(value, dtype)
        if isinstance(value, DType):
            return wide(value)
        if isinstance(value, TensorType):
            return TensorType(wide(value.dtype), value.shape)
        return tuple(map(attr, value)) if isinstance(value, tuple) else value

    values: dict[Node, Node] = {}
    for node in graph.nodes:
        args = [None if arg is None else values[arg] for arg in node.args]
        values[node] = make(node.op, *args, **{name: attr(value) for name, value in node.attrs})
    return Graph(
        graph.name,
        tuple(values[node] for node in graph.inputs),
        tuple(values[node] for node in graph.outputs),
        graph.weights,
        graph.output_names,
    )

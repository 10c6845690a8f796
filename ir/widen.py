"""A graph over a wider floating-point type: a reference whose own rounding does not count."""

from __future__ import annotations

from .build import cast, make
from .dtypes import DType
from .graph import Graph
from .node import Attr, Node
from .types import TensorType

_PICKS = ("embedding", "index_select")


def _is_table(graph: Graph, param: Node) -> bool:
    users = graph.users[param]
    picks = all(user.op in _PICKS and user.operands.index(param) == 0 for user in users)
    return param.op == "param" and bool(users) and picks and param not in graph.outputs


def widened(graph: Graph, dtype: DType) -> Graph:
    """The same ops over ``dtype`` in place of every narrower floating-point type but those of codes
    (8-bit floats), in bodies too. Whoever runs it casts inputs and weights to what params declare.

    A table that rows are only picked from keeps its type, and they are cast: few of many.
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

    tables = {node for node in graph.params if _is_table(graph, node)}
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        args = [None if arg is None else values[arg] for arg in node.args]
        if node in tables:
            values[node] = node
        elif node.op in _PICKS and node.operands[0] in tables:
            picked = make(node.op, *args, **dict(node.attrs))
            values[node] = cast(picked, wide(picked.dtype))
        else:
            values[node] = make(node.op, *args, **{name: attr(v) for name, v in node.attrs})
    return Graph(
        graph.name,
        tuple(values[node] for node in graph.inputs),
        tuple(values[node] for node in graph.outputs),
        graph.weights,
        graph.output_names,
    )

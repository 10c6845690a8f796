"""A problem's graph over float64: the reference that kernels are held against."""

from __future__ import annotations

from ....ir.build import input_node, make
from ....ir.dtypes import DType
from ....ir.graph import Graph
from ....ir.node import Attr, Node
from ....ir.types import TensorType


def in_float64(graph: Graph) -> Graph:
    """The same ops over float64 in place of every other floating-point type."""
    values: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "input":
            values[node] = input_node(str(node.attr("name")), _wide(node.type))
            continue
        args = [None if arg is None else values[arg] for arg in node.args]
        attrs: dict[str, Attr] = {name: _attr(value) for name, value in node.attrs}
        values[node] = make(node.op, *args, **attrs)
    return Graph(
        graph.name,
        tuple(values[n] for n in graph.inputs),
        tuple(values[n] for n in graph.outputs),
    )


def _attr(value: Attr) -> Attr:
    if isinstance(value, Graph):
        return in_float64(value)
    if isinstance(value, DType):
        return DType.F64 if value.is_float else value
    return value


def _wide(type_: TensorType) -> TensorType:
    return TensorType(DType.F64 if type_.dtype.is_float else type_.dtype, type_.shape)

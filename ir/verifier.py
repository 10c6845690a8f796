"""What must hold of every graph, checked after every pass and in every test."""

from __future__ import annotations

from collections import Counter

from ..errors import GraphError
from .dims import symbols_of
from .dtypes import DType
from .graph import Graph, input_name, param_name
from .node import Node
from .printer import nested_graphs
from .schema import schema


def verify(graph: Graph) -> Graph:
    """Returns ``graph`` when it is well-formed.

    Raises:
        GraphError: duplicate or missing names, a node whose stored type is not the inferred one, a param without a
            weight or of another shape, a symbol that no input binds, an output that is a tuple or state of another type.
    """
    _check_names(graph)
    _check_symbols(graph)
    for node in graph.nodes:
        _check_node(graph, node)
    _check_params(graph)
    for body in nested_graphs(graph).values():
        if body.params:
            raise _ill(graph, body.name, "a body without params", param_name(body.params[0]))
        verify(body)
    return graph


def _check_names(graph: Graph) -> None:
    if not graph.name.isidentifier():
        raise _ill(graph, graph.name, "a name that is an identifier", graph.name)
    if len(graph.output_names) != len(graph.outputs):
        raise _ill(graph, "outputs", f"{len(graph.outputs)} names", str(graph.output_names))
    for kind, names in (
        ("inputs", [input_name(node) for node in graph.inputs]),
        ("outputs", list(graph.output_names)),
    ):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise _ill(graph, kind, "one of each name", f"{twice[0]!r} twice")
    for node in graph.nodes:
        if node.op == "input" and node not in graph.inputs:
            raise _ill(graph, input_name(node), "an input of the graph", "a foreign input")
    for name in graph.state:
        before, after = graph.input(name), graph.outputs[graph.output_names.index(name)]
        if before.type != after.type:
            raise _ill(graph, f"state {name}", str(before.type), str(after.type))


def _check_symbols(graph: Graph) -> None:
    bound = {str(s) for node in graph.inputs for s in node.shape if str(s).isidentifier()}
    for node in graph.nodes:
        for value_type in node.types:
            free = value_type.symbols - bound
            if free:
                raise _ill(graph, str(node), f"sizes over {sorted(bound)}", f"{sorted(free)}")
    for node in graph.inputs:
        for size in node.shape:
            if symbols_of(size) - bound:
                raise _ill(graph, input_name(node), "sizes that inputs bind", str(size))


def _check_node(graph: Graph, node: Node) -> None:
    spec = schema(node.op)
    types = [None if arg is None else arg.value_type for arg in node.args]
    inferred = spec.infer(*types, **dict(node.attrs))
    if inferred != node.value_type:
        raise _ill(graph, str(node), f"type {inferred}", str(node.value_type))


def _check_params(graph: Graph) -> None:
    for node in graph.params:
        name = param_name(node)
        if name not in graph.weights:
            raise _ill(graph, f"param {name!r}", "a weight of that name", "none")
        weight = graph.weights[name]
        found = (DType.from_torch(weight.dtype), tuple(weight.shape))
        if found != (node.dtype, node.shape):
            raise _ill(graph, f"param {name!r}", str(node.type), f"{found[0]}{list(found[1])}")


def _ill(graph: Graph, culprit: str, expected: str, found: str) -> GraphError:
    return GraphError(
        f"{culprit} in graph {graph.name}",
        expected=expected,
        found=found,
        remedy="The pass that made this graph is wrong; bisect with TILEWRIGHT_PASS_LIMIT.",
    )

"""What must hold of every graph, checked after every pass and in every test."""

from __future__ import annotations

from collections import Counter

from ..errors import GraphError
from .dims import Dim, is_name, sole_symbol, symbols_of
from .dtypes import DType
from .graph import Graph, input_name, param_name
from .node import Attr, Node
from .printer import RESERVED, nested_graphs
from .schema import infer_type, schema
from .types import TensorType


def verify(graph: Graph) -> Graph:
    """Returns ``graph`` when it is well-formed.

    Raises:
        GraphError: a name that text cannot hold, names twice or missing, a node whose stored type
            is not the inferred one, a param without a weight or of another shape, a symbol that no
            input binds, an output that is a tuple, or state of another type.
    """
    _check_names(graph)
    _check_ends(graph)
    bound = _bound_symbols(graph)
    for node in graph.nodes:
        _check_symbols(graph, node, bound)
        _check_node(graph, node)
    _check_params(graph)
    for body in nested_graphs(graph).values():
        if body.name in graph.symbols:
            raise _ill(graph, body.name, "a body whose name is no symbol's", body.name)
        if body.params:
            raise _ill(graph, body.name, "a body without params", param_name(body.params[0]))
        verify(body)
    return graph


def _check_names(graph: Graph) -> None:
    if not is_name(graph.name) or graph.name in RESERVED:
        raise _ill(graph, repr(graph.name), "a graph name that is an ASCII identifier", graph.name)
    if len(graph.output_names) != len(graph.outputs):
        raise _ill(graph, "outputs", f"{len(graph.outputs)} names", str(graph.output_names))
    for kind, names in (
        ("inputs", [input_name(node) for node in graph.inputs]),
        ("outputs", list(graph.output_names)),
    ):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise _ill(graph, kind, "one of each name", f"{twice[0]!r} twice")


def _check_ends(graph: Graph) -> None:
    """Inputs are ``input`` nodes and the only ones; outputs are single tensors; state fits."""
    inputs = set(graph.inputs)
    for node in graph.inputs:
        if node.op != "input":
            raise _ill(graph, str(node), "an input node among the inputs", node.op)
    for node in graph.nodes:
        if node.op == "input" and node not in inputs:
            raise _ill(graph, input_name(node), "an input of the graph", "a foreign input")
    for name, output in zip(graph.output_names, graph.outputs, strict=True):
        if not isinstance(output.value_type, TensorType):
            raise _ill(graph, f"output {name}", "a single tensor", f"{output.value_type}")
    by_name = dict(zip(graph.output_names, graph.outputs, strict=True))
    for name in graph.state:
        before, after = graph.input(name), by_name[name]
        if before.type != after.type:
            raise _ill(graph, f"state {name}", str(before.type), str(after.type))


def _bound_symbols(graph: Graph) -> set[str]:
    """The symbols that the inputs' shapes give a value: those in a size ``a*x + b``."""
    sizes = [size for node in graph.inputs for size in node.shape]
    bound = {name for size in sizes if (name := sole_symbol(size)) is not None}
    for node in graph.inputs:
        if node.type.symbols - bound:
            raise _ill(graph, input_name(node), "sizes that inputs bind", str(node.type))
    return bound


def _check_symbols(graph: Graph, node: Node, bound: set[str]) -> None:
    in_attrs = {name for _, value in node.attrs for name in _attr_symbols(value)}
    in_types = {name for value_type in node.types for name in value_type.symbols}
    free = (in_attrs | in_types) - bound
    if free:
        raise _ill(graph, str(node), f"sizes over {sorted(bound)}", f"{sorted(free)}")


def _attr_symbols(value: Attr) -> frozenset[str]:
    """Symbols of the sizes in an attribute; those of a nested graph are its own affair."""
    found: set[str] = set()
    if isinstance(value, Dim):
        found.update(symbols_of(value))
    elif isinstance(value, TensorType):
        found.update(value.symbols)
    elif isinstance(value, tuple):
        found.update(*map(_attr_symbols, value))
    return frozenset(found)


def _check_node(graph: Graph, node: Node) -> None:
    types = [None if arg is None else arg.value_type for arg in node.args]
    inferred = infer_type(schema(node.op), types, dict(node.attrs))
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

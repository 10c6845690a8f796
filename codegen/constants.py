"""Values known before any input is: weights, constants, and what is computed from them alone."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from ..ir.build import input_node, make
from ..ir.dims import Dim, Size, symbols_of
from ..ir.dims import substitute as resize
from ..ir.graph import Graph, param_name
from ..ir.node import Attr, Node
from ..ir.ops.control import body_of

_KNOWN: WeakKeyDictionary[Node, bool] = WeakKeyDictionary()
_NEVER = frozenset({"input", "aten", "cond", "fused"})


def is_constant(node: Node) -> bool:
    """Whether a value depends on weights and constants alone, and has static sizes."""
    order: list[Node] = [node]
    while order:
        top = order[-1]
        waiting = [o for o in top.operands if o not in _KNOWN]
        if top in _KNOWN or not waiting:
            order.pop()
            _KNOWN[top] = (
                top.op not in _NEVER
                and not any(t.symbols for t in top.types)
                and not any(symbols_in(value) for _, value in top.attrs)
                and all(_KNOWN[o] for o in top.operands)
            )
        else:
            order.extend(waiting)
    return _KNOWN[node]


def symbols_in(value: Attr) -> frozenset[str]:
    """The symbols of the sizes in an attribute."""
    if isinstance(value, tuple):
        return frozenset().union(*map(symbols_in, value))
    return symbols_of(value) if isinstance(value, Dim) else frozenset()


def closed_graph(name: str, outputs: tuple[Node, ...]) -> tuple[Graph, tuple[str, ...]]:
    """A graph of constant values over inputs ``w0, w1, …``, and the weights these stand for."""
    params = [n for n in Graph(name, (), outputs).nodes if n.op == "param"]
    inputs = {node: input_node(f"w{i}", node.type) for i, node in enumerate(params)}
    body = Graph(name, tuple(inputs.values()), tuple(substitute(o, inputs) for o in outputs))
    return body, tuple(map(param_name, params))


def substitute(
    root: Node, values: Mapping[Node, Node], sizes: Mapping[str, Size] | None = None
) -> Node:
    """``root`` with some of the values below it replaced, and the symbols in ``sizes``."""
    new: dict[Node, Node] = dict(values)
    for node in Graph("below", (), (root,)).nodes:
        if node not in new and node.op != "input":
            args = [None if arg is None else new[arg] for arg in node.args]
            attrs = {name: _resized(value, sizes or {}) for name, value in node.attrs}
            new[node] = make(node.op, *args, **attrs)
    return new[root]


def _resized(value: Attr, sizes: Mapping[str, Size]) -> Attr:
    if isinstance(value, tuple):
        return tuple(_resized(element, sizes) for element in value)
    return resize(value, sizes) if isinstance(value, Dim) else value


def expand_fused(graph: Graph) -> Graph:
    """The graph with the bodies of its ``fused`` nodes in their place."""
    new: dict[Node, Node] = {}
    results: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        args = [None if arg is None else new[arg] for arg in node.args]
        if node.op == "fused":
            body = body_of(node)
            inner = dict(zip(body.inputs, [arg for arg in args if arg is not None], strict=True))
            results[node] = tuple(substitute(output, inner) for output in body.outputs)
            new[node] = results[node][0]
        elif node.op == "item" and node.operands[0] in results:
            index = node.attr("index")
            assert isinstance(index, int)
            new[node] = results[node.operands[0]][index]
        else:
            same = all(a is b for a, b in zip(args, node.args, strict=True))
            new[node] = node if same else make(node.op, *args, **dict(node.attrs))
    return graph.with_outputs(tuple(new[output] for output in graph.outputs)) if results else graph

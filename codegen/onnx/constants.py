"""Which values are known before any input is: weights, constants, and what is computed from them alone."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from ...ir.build import input_node, make
from ...ir.dims import Dim, Size
from ...ir.dims import substitute as resize
from ...ir.graph import Graph, param_name
from ...ir.node import Attr, Node

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
                and not any(_symbolic(value) for _, value in top.attrs)
                and all(_KNOWN[o] for o in top.operands)
            )
        else:
            order.extend(waiting)
    return _KNOWN[node]


def _symbolic(value: Attr) -> bool:
    if isinstance(value, tuple):
        return any(map(_symbolic, value))
    return isinstance(value, Dim)


def closed_graph(name: str, outputs: tuple[Node, ...]) -> tuple[Graph, tuple[str, ...]]:
    """A graph of constant values over inputs ``w0, w1, …``, and the weights that these stand for."""
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

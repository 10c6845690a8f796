"""A call on its own: what a template is asked for, as a graph of one node that text can hold."""

from __future__ import annotations

from ....ir.build import input_node, item, make
from ....ir.graph import Graph
from ....ir.node import Node
from ..layout import Layout, located


def problem_graph(node: Node) -> Graph:
    """A graph of a call over inputs in place of the buffers that its operands lie in; views of
    them stay. It returns all of the call's results.
    """
    bases: dict[Node, Node] = {}
    for operand in node.operands:
        base, _ = located(operand)
        if base not in bases:
            bases[base] = input_node(f"operand_{len(bases)}", base.type)
        if operand.op == "share_pages":  # what pages are shared changes no problem
            bases[operand] = bases[base]
    built = _rebuilt(node, dict(bases))
    count = len(built.types)
    results = (built,) if count == 1 else tuple(item(built, index) for index in range(count))
    return Graph("problem", tuple(dict.fromkeys(bases.values())), results)


def call_of(graph: Graph) -> Node:
    """The call of a problem's graph."""
    result = graph.outputs[0]
    return result.operands[0] if result.op == "item" else result


def layouts_of(node: Node) -> tuple[Layout | None, ...]:
    """Where each operand of a call lies in its buffer."""
    return tuple(None if arg is None else located(arg)[1] for arg in node.args)


def bases_of(node: Node) -> tuple[Node | None, ...]:
    """The buffer that each operand of a call lies in."""
    return tuple(None if arg is None else located(arg)[0] for arg in node.args)


def _rebuilt(node: Node, known: dict[Node, Node]) -> Node:
    if node not in known:
        args = [None if arg is None else _rebuilt(arg, known) for arg in node.args]
        known[node] = make(node.op, *args, **dict(node.attrs))
    return known[node]

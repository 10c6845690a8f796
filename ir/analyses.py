"""Analyses of a graph: liveness, dominators, convexity of a group, critical path."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from .graph import Graph
from .node import Node

if TYPE_CHECKING:
    import networkx as nx


def digraph(graph: Graph) -> nx.DiGraph[Node]:
    """Edges from operand to user."""
    import networkx as nx

    edges: nx.DiGraph[Node] = nx.DiGraph()
    edges.add_nodes_from(graph.nodes)
    edges.add_edges_from((a, node) for node in graph.nodes for a in node.operands)
    return edges


def liveness(graph: Graph) -> dict[Node, tuple[int, int]]:
    """Of each value: the index in ``graph.nodes`` where it is made, and that of its last use.

    Outputs live to the end: their last use is ``len(graph.nodes)``.
    """
    index = {node: i for i, node in enumerate(graph.nodes)}
    last = dict(index)
    for node in graph.nodes:
        for operand in node.operands:
            last[operand] = max(last[operand], index[node])
    for output in graph.outputs:
        last[output] = len(graph.nodes)
    return {node: (index[node], last[node]) for node in graph.nodes}


def dominators(graph: Graph) -> dict[Node, Node | None]:
    """Immediate dominator of each node: the last value on every path to it from the leaves.

    Leaves, and nodes whose paths share nothing, have None.
    """
    import networkx as nx

    root = object()
    edges: nx.DiGraph[object] = nx.DiGraph()
    edges.add_node(root)
    for node in graph.nodes:
        edges.add_edges_from((operand, node) for operand in node.operands or (root,))
    parents = nx.immediate_dominators(edges, root)
    found: dict[Node, Node | None] = {}
    for node in graph.nodes:
        parent = parents[node]
        found[node] = parent if isinstance(parent, Node) else None
    return found


def is_convex(graph: Graph, group: Collection[Node]) -> bool:
    """Whether no path leaves the group and comes back: only then can it run as one call."""
    members = set(group)
    reaches: set[Node] = set()
    for node in graph.nodes:
        outside_path = any(o in reaches or (o in members) for o in node.operands)
        if node in members:
            if any(o in reaches for o in node.operands):
                return False
        elif outside_path:
            reaches.add(node)
    return True


def critical_path(graph: Graph, weight: Callable[[Node], float]) -> tuple[list[Node], float]:
    """The chain of dependent nodes with the largest total ``weight`` (say seconds), and the total.

    Weights are not negative. Of equal chains the one through the first operands is taken.
    """
    best: dict[Node, float] = {}
    parent: dict[Node, Node | None] = {}
    for node in graph.nodes:
        before = max(node.operands, key=best.__getitem__, default=None)
        parent[node] = before
        best[node] = weight(node) + (0.0 if before is None else best[before])
    if not best:
        return [], 0.0
    end = max(best, key=best.__getitem__)
    path: list[Node] = []
    cursor: Node | None = end
    while cursor is not None:
        path.append(cursor)
        cursor = parent[cursor]
    return path[::-1], best[end]

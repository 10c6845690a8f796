"""Analyses of a graph as a networkx DiGraph: liveness, dominators, convexity of a group, critical path."""

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
    """Of each value: the index in ``graph.nodes`` where it is made, and of its last use. Outputs live to the end."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    last = dict(index)
    for node in graph.nodes:
        for operand in node.operands:
            last[operand] = max(last[operand], index[node])
    for output in graph.outputs:
        last[output] = len(graph.nodes)
    return {node: (index[node], last[node]) for node in graph.nodes}


def dominators(graph: Graph) -> dict[Node, Node | None]:
    """Immediate dominator of each node: the last value through which every path from the inputs leads.

    Leaves, and nodes whose paths share nothing, have None.
    """
    import networkx as nx

    edges = digraph(graph)
    root = object()
    edges.add_edges_from((root, node) for node in graph.nodes if not node.operands)  # type: ignore[misc]
    parents = nx.immediate_dominators(edges, root)  # type: ignore[arg-type]
    return {n: None if parents[n] is root else parents[n] for n in graph.nodes}


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
    """The chain of dependent nodes with the largest total ``weight`` (seconds, say), and that total."""
    best: dict[Node, tuple[float, Node | None]] = {}
    for node in graph.nodes:
        before = max(((best[o][0], i) for i, o in enumerate(node.operands)), default=None)
        parent = None if before is None else node.operands[before[1]]
        best[node] = ((0.0 if before is None else before[0]) + weight(node), parent)
    if not best:
        return [], 0.0
    end = max(best, key=lambda n: best[n][0])
    path, cursor = [], end
    while cursor is not None:
        path.append(cursor)
        cursor = best[cursor][1]  # type: ignore[assignment]
    return path[::-1], best[end][0]

"""Analyses against brute force and networkx on random graphs."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from random_graphs import graphs
from tilewright.ir import analyses
from tilewright.ir.build import input_node, make
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.types import TensorType

pytestmark = pytest.mark.quick


@given(graphs())
def test_nodes_are_in_topological_order_and_users_invert_operands(graph):
    index = {node: i for i, node in enumerate(graph.nodes)}
    assert len(index) == len(graph.nodes)
    assert all(index[o] < index[n] for n in graph.nodes for o in n.operands)
    edges = {(o, n) for n in graph.nodes for o in n.operands}
    assert {(o, n) for o, users in graph.users.items() for n in users} == edges
    assert set(analyses.digraph(graph).edges) == edges


@given(graphs())
def test_liveness(graph):
    index = {node: i for i, node in enumerate(graph.nodes)}
    for node, (made, last) in analyses.liveness(graph).items():
        uses = [index[n] for n in graph.nodes if node in n.operands]
        end = len(graph.nodes) if node in graph.outputs else max(uses, default=index[node])
        assert (made, last) == (index[node], end)


@given(graphs())
def test_dominators_cut_every_path(graph):
    edges = nx.DiGraph(analyses.digraph(graph))
    edges.add_edges_from(("root", n) for n in graph.nodes if not n.operands)
    for node, parent in analyses.dominators(graph).items():
        strict = {
            d
            for d in graph.nodes
            if d is not node and not nx.has_path(edges.subgraph(set(edges) - {d}), "root", node)
        }
        assert (parent is None) == (not strict)
        if parent is not None:
            assert parent in strict
            assert all(d is parent or nx.has_path(edges, d, parent) for d in strict)


@given(graphs(), st.data())
def test_convexity(graph, data):
    group = data.draw(st.sets(st.sampled_from(graph.nodes), max_size=5))
    edges = analyses.digraph(graph)
    outside = set(graph.nodes) - group
    between = [
        n
        for n in outside
        if any(nx.has_path(edges, g, n) for g in group)
        and any(nx.has_path(edges, n, g) for g in group)
    ]
    assert analyses.is_convex(graph, group) == (not between)


@given(graphs(), st.data())
def test_critical_path(graph, data):
    cost = {node: float(data.draw(st.integers(0, 9))) for node in graph.nodes}
    path, total = analyses.critical_path(graph, cost.__getitem__)
    assert sum(cost[n] for n in path) == total
    assert all(a in b.operands for a, b in zip(path, path[1:], strict=False))
    edges = nx.DiGraph()
    edges.add_edges_from(("root", n, {"weight": cost[n]}) for n in graph.nodes)
    edges.add_edges_from((o, n, {"weight": cost[n]}) for n in graph.nodes for o in n.operands)
    assert total == nx.dag_longest_path_length(edges)


def test_an_empty_graph():
    empty = Graph("empty", (), ())
    assert analyses.critical_path(empty, lambda n: 1.0) == ([], 0.0)
    assert analyses.dominators(empty) == {} and analyses.liveness(empty) == {}
    assert analyses.is_convex(empty, ())


def test_thousands_of_nodes():
    x = input_node("x", TensorType(DType.F32, (2,)))
    node = x
    for _ in range(3000):
        node = make("neg", node)
    graph = Graph("deep", (x,), (node,))
    assert len(analyses.critical_path(graph, lambda n: 1.0)[0]) == 3001
    assert analyses.dominators(graph)[node] is node.operands[0]

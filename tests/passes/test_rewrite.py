"""The engine: fixed point, depth, guards. Written against small rules of its own."""

from __future__ import annotations

import time

import pytest

from tilewright.errors import GraphError
from tilewright.ir.build import const, input_node, make
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.parser import parse_graph
from tilewright.ir.types import TensorType
from tilewright.passes.match import P, any_node, equation, match, maybe_cast, number, scalar
from tilewright.passes.rewrite import Context, Rule, rewrite, rule, substitute

X, Y = any_node("x"), any_node("y")
F32 = TensorType(DType.F32, (4,))


def chain(length: int, op: str = "neg") -> Graph:
    x = node = input_node("x", F32)
    for i in range(length):
        node = make("add", make(op, node), const(i, DType.F32))
    return Graph("g", (x,), (node,))


NEG_NEG = equation("neg_neg", P.neg(P.neg(X)), lambda x: x)
ABS_NEG = equation("abs_neg", P.abs(P.neg(X)), lambda x: make("abs", x))


@pytest.mark.quick
def test_results_of_rules_are_rewritten_again():
    graph = parse_graph("""
def g(x: f32[4]):
    a: f32[4] = neg(x)
    b: f32[4] = neg(a)
    c: f32[4] = neg(b)
    d: f32[4] = abs(c)
    return {"y": d}
""")
    assert str(rewrite(graph, [ABS_NEG, NEG_NEG])) == (
        'def g(x: f32[4]):\n    abs_0: f32[4] = abs(x)\n    return {"y": abs_0}\n'
    )


def test_deep_graph_needs_no_recursion():
    start = time.perf_counter()
    square = equation("abs", P.neg(X), lambda x: make("abs", x))
    result = rewrite(chain(5000), [square])
    assert {node.op for node in result.calls()} == {"abs", "add"}
    assert time.perf_counter() - start < 10


def test_rules_that_undo_one_another_are_named():
    there = equation("there", P.neg(X), lambda x: make("abs", x))
    back = equation("back", P.abs(X), lambda x: make("neg", x))
    with pytest.raises(GraphError, match="there.*back|back.*there"):
        rewrite(chain(1), [there, back])


def test_growth_is_an_error():
    grow = equation("grow", P.neg(X), lambda x: make("neg", make("abs", x)))
    with pytest.raises(GraphError, match="grow"):
        rewrite(chain(1), [grow])
    wrap = equation("wrap", P.neg(X), lambda x: make("abs", make("neg", x)))
    with pytest.raises(GraphError, match="wrap"):
        rewrite(chain(1), [wrap])


def test_a_rule_that_changes_the_type_is_named():
    bad = Rule("bad", ("neg",), lambda node, context: make("reshape", node.args[0], shape=(2, 2)))
    with pytest.raises(GraphError, match="rule bad"):
        rewrite(chain(1), [bad])


def test_single_use_counts_users_and_outputs():
    seen = {}

    @rule("abs")
    def look(node, context: Context):
        seen[node.operands[0].op] = context.single_use(node.operands[0])

    x = input_node("x", F32)
    shared, alone = make("neg", x), make("exp", x)
    outputs = (make("abs", shared), make("abs", alone), shared)
    rewrite(Graph("g", (x,), outputs), [look])
    assert seen == {"neg": False, "exp": True}


def test_nested_graphs_are_rewritten():
    text = """
def g(p: bool[()], x: f32[4]):
    def yes(a: f32[4]):
        neg_0: f32[4] = neg(a)
        neg_1: f32[4] = neg(neg_0)
        return {"y": neg_1}
    def no(a: f32[4]):
        return {"y": a}
    cond_0: f32[4] = cond(p, x, then=yes, otherwise=no)
    return {"y": cond_0}
"""
    assert "neg" not in str(rewrite(parse_graph(text), [NEG_NEG]))


def test_substitute_infers_types_anew():
    x = input_node("x", F32)
    graph = Graph("g", (x,), (make("neg", make("exp", x)),))
    wide = make("concat", x, x, dim=0)
    assert substitute(graph, {make("exp", x): wide}).outputs[0].shape == (8,)


def test_patterns_commute_and_repeat_captures():
    x, y = input_node("x", F32), input_node("y", F32)
    half = const(0.5, DType.F32)
    assert match(P.mul(number(0.5), X), make("mul", x, half)) == {"x": x}
    assert match(P.add(X, X), make("add", x, y)) is None
    assert match(P.add(X, P.neg(X)), make("add", make("neg", y), y)) == {"x": y}
    assert match(P.sub(X, P.neg(X)), make("sub", make("neg", y), y)) is None
    assert match(P.mul(X, scalar("c")), make("mul", x, y)) is None
    cast = make("cast", x, dtype=DType.F64)
    assert match(
        P.exp(maybe_cast(P.neg(X))), make("exp", make("cast", make("neg", x), dtype=DType.F64))
    )
    assert match(P.cast(X, dtype=DType.F32), cast) is None

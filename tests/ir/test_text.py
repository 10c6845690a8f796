"""Graphs print to text that parses back to the same graph; other text is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from random_graphs import graphs
from tilewright.errors import GraphError
from tilewright.ir.build import const, input_node, item, make, param
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.parser import parse_attr, parse_graph, parse_type_text
from tilewright.ir.printer import print_attr
from tilewright.ir.types import TensorType

T = symbol("T")
ROWS = TensorType(DType.F32, (T, 4))
X = input_node("x", ROWS)

GOLDEN = """def block(x: f32[T, 64]):
    up_weight: f32[128, 64] = param("up.weight")
    linear_0: f32[T, 128] = linear(x, up_weight)
    add_0: f32[T, 128] = add(linear_0, f32(0.5))
    return {"y": add_0}
"""


@pytest.mark.quick
@settings(max_examples=100)
@given(graphs())
def test_random_graphs_round_trip(graph):
    text = str(graph)
    parsed = parse_graph(text)
    assert parsed == graph
    assert str(parsed) == text


@pytest.mark.quick
def test_golden_text():
    assert str(parse_graph(GOLDEN)) == GOLDEN


def _trip(*outputs, inputs=(X,), names=()):
    graph = Graph("g", inputs, outputs, {}, names)
    assert parse_graph(str(graph)) == graph
    return str(graph)


@pytest.mark.quick
@pytest.mark.parametrize(
    "name",
    ["a.b", "x", "add_0", "if", "f32", 'q"uote', "back\\slash", "new\nline", "\u2028", "😀", ""]
    + ["\ud800", "ﬁ", "T", "1st"],
)
def test_param_names(name):
    _trip(make("add", make("add", X, X), param(name, ROWS)))


@pytest.mark.quick
def test_params_whose_names_look_alike():
    names = ("a.b", "a_b", "a-b", "a_b_1")
    total = X
    for name in names:
        total = make("add", total, param(name, ROWS))
    _trip(total)


@pytest.mark.quick
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-300, -1.5, float("inf"), float("-inf"), float("nan"), 0.1]
)
def test_float_constants(value):
    _trip(make("mul", X, const(value, DType.F32)))


@pytest.mark.quick
def test_constants_of_other_types_scalars_and_outputs():
    flag, count = const(True, DType.BOOL), const(-3, DType.I8)
    text = _trip(
        flag, count, make("dim_value", size=T, dtype=DType.I64), X, X, names=tuple("abcde")
    )
    assert "bool(True)" in text and "i8(-3)" in text and "i64[()]" in text


@pytest.mark.quick
@pytest.mark.parametrize(
    "value",
    [
        (),
        (1,),
        ((1, -2.5), (None, True), "a'b\"\n"),
        T,
        -T,
        2 * T - 1,
        (T // 2, T % 3),
        DType.BF16,
        ROWS,
    ]
    + [
        TensorType(DType.I8, ()),
        (TensorType(DType.F8E4M3, (T, 2)),),
        float("-inf"),
        -7,
        False,
        "f32",
    ],
)
def test_attributes_round_trip(value):
    assert repr(parse_attr(print_attr(value))) == repr(value)


@pytest.mark.quick
def test_graphs_within_graphs_within_graphs():
    inner = Graph("inner", (X,), (make("exp", X),))
    middle = Graph("middle", (X,), (make("fused", X, body=inner, kind="k"), X))
    outer = make("fused", X, body=middle, kind="k")
    again = make("fused", X, body=inner, kind="k")
    text = _trip(make("add", item(outer, 0), again), item(outer, 1))
    assert text.count("def inner") == 2 and text.count("def middle") == 1


@pytest.mark.quick
def test_two_bodies_of_one_name_are_refused():
    bodies = [Graph("body", (X,), (make(op, X),)) for op in ("exp", "neg")]
    calls = [make("fused", X, body=body, kind="k") for body in bodies]
    with pytest.raises(GraphError, match="one body a name"):
        str(Graph("g", (X,), tuple(calls)))


@pytest.mark.quick
def test_type_annotations():
    assert parse_type_text("f32[()]") == TensorType(DType.F32, ())
    assert parse_type_text("bf16[T, 4*T]") == TensorType(DType.BF16, (T, 4 * T))


def test_a_graph_thousands_deep():
    x, y = X, make("neg", X)
    for _ in range(6000):
        x, y = make("add", x, y), x
    graph = Graph("deep", (X,), (x,))
    parsed = parse_graph(str(graph))
    assert parsed == graph and len(graph.nodes) == 6002 and repr(x)


def _with(statement):
    return f"def f(x: f32[2]):\n  {statement}\n  return {{'y': y}}"


BAD = {
    "two functions": "def f(x: f32[2]):\n  return {'y': x}\ndef g(): return {}",
    "no function": "x = 1",
    "no syntax": "def f(",
    "null byte": "def f(x: f32[2]):\n  return {'y': x}\0",
    "no return": "def f(x: f32[2]):\n  y: f32[2] = exp(x)",
    "return within": "def f(x: f32[2]):\n  return {'y': x}\n  return {'y': x}",
    "untyped input": "def f(x):\n  return {'y': x}",
    "default": "def f(x: f32[2] = 1):\n  return {'y': x}",
    "varargs": "def f(*x: f32[2]):\n  return {}",
    "decorator": "@d\ndef f(x: f32[2]):\n  return {'y': x}",
    "input of a reserved name": "def f(f32: f32[2]):\n  return {'y': f32}",
    "unknown type": "def f(x: f31[2]):\n  return {'y': x}",
    "negative size": _with("y: f32[-2, -1] = reshape(x, shape=(-2, -1))"),
    "unknown value": "def f(x: f32[2]):\n  return {'y': z}",
    "unknown op": _with("y: f32[2] = frobnicate(x)"),
    "unknown attribute": _with("y: f32[2] = exp(x, a=1)"),
    "attribute twice": _with("y: f32[2] = softmax(x, dim=0, dim=0)"),
    "attributes unpacked": _with("y: f32[2] = exp(x, **a)"),
    "missing attribute": _with("y: f32[2] = softmax(x)"),
    "too many operands": _with("y: f32[2] = exp(x, x)"),
    "too few operands": _with("y: f32[2] = add(x)"),
    "wrong annotation": _with("y: f32[3] = exp(x)"),
    "name twice": "def f(x: f32[2]):\n  x: f32[2] = exp(x)\n  return {'y': x}",
    "input within": "def f():\n  y: f32[2] = input(name='y', type=f32[2])\n  return {'y': y}",
    "plain assignment": "def f(x: f32[2]):\n  y = exp(x)\n  return {'y': y}",
    "attribute call": _with("y: f32[2] = os.system(x)"),
    "expression": _with("y: f32[2] = exp(x + x)"),
    "output twice": "def f(x: f32[2]):\n  return {'y': x, 'y': x}",
    "output name no string": "def f(x: f32[2]):\n  return {1: x}",
    "outputs unpacked": "def f(x: f32[2]):\n  return {**x}",
    "constant too large": "def f():\n  return {'y': i8(300)}",
    "constant not whole": "def f():\n  return {'y': i8(2.5)}",
    "param with more": "def f():\n  y: f32[2] = param('a', k=1)\n  return {'y': y}",
    "deep nesting": _with("y: f32[2] = exp(x, a=" + "-" * 20000 + "1)"),
}


@pytest.mark.quick
@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_other_text_is_refused(text):
    with pytest.raises(GraphError):
        parse_graph(text)


@pytest.mark.quick
@pytest.mark.parametrize("text", ["", "f32", "f32[", "f32[1.5]", "[2]", "f32(2)"])
def test_other_text_is_no_type(text):
    with pytest.raises(GraphError):
        parse_type_text(text)

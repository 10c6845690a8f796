"""The verifier: one ill-formed graph a guard."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from random_graphs import graphs
from tilewright.errors import GraphError
from tilewright.ir.build import const, input_node, make, param
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import intern_node
from tilewright.ir.types import TensorType
from tilewright.ir.verifier import verify

pytestmark = pytest.mark.quick

T, S = symbol("T"), symbol("S")


class Stored:
    """A weight that has the given shape and element type."""

    def __init__(self, shape, dtype=torch.float32):
        self.shape, self.dtype = shape, dtype

    def load(self):
        return torch.ones(self.shape, dtype=self.dtype)


def tensor(*shape, name="x", dtype=DType.F32):
    return input_node(name, TensorType(dtype, shape))


X, Y = tensor(T, 4), tensor(T, 4, name="y")
W = param("w", TensorType(DType.F32, (4,)))
SUM = make("add", X, W)


def good():
    return Graph("g", (X,), (SUM,), {"w": Stored((4,))})


def fused(body, *operands):
    return make("fused", *operands, body=body, kind="k")


def call(*outputs, inputs=(X,), name="g", weights=None, names=()):
    return lambda: Graph(name, inputs, outputs, weights or {}, names)


FORGED = intern_node("exp", (X,), {}, TensorType(DType.F32, (T, 5)))
ILL_ATTRIBUTE = intern_node("softmax", (X,), {"dim": 7}, X.type)
UNKNOWN = intern_node("frobnicate", (X,), {}, X.type)
BODY = Graph("body", (X,), (make("exp", X),))

BAD = {
    "graph name": (call(X, name="a-b"), "graph name"),
    "reserved graph name": (call(X, name="f32"), "graph name"),
    "non-ASCII graph name": (call(X, name="ﬁ"), "graph name"),
    "input twice": (call(X, inputs=(X, X)), "'x' twice"),
    "inputs of one name": (call(X, inputs=(X, tensor(3))), "'x' twice"),
    "output twice": (call(X, X, names=("a", "a")), "'a' twice"),
    "output names": (call(X, X, names=("a",)), "2 names"),
    "foreign input": (call(make("add", X, Y)), "foreign input"),
    "no input": (call(X, inputs=(X, make("exp", X))), "input node"),
    "tuple output": (call(make("topk", X, k=1, dim=1)), "single tensor"),
    "state type": (call(make("sum", X, dims=(1,)), names=("x",)), "state x"),
    "forged type": (call(FORGED), r"type f32\[T, 4\]"),
    "forged attribute": (call(ILL_ATTRIBUTE), "softmax"),
    "unknown op": (call(UNKNOWN), "frobnicate"),
    "missing weight": (call(SUM), "a weight of that name"),
    "weight shape": (call(SUM, weights={"w": Stored((5,))}), "param 'w'"),
    "weight type": (call(SUM, weights={"w": Stored((4,), torch.float16)}), "param 'w'"),
    "weight of no type": (call(SUM, weights={"w": Stored((4,), torch.uint16)}), "uint16"),
    "unbound input size": (call(X, inputs=(X, tensor(T * S, name="y"))), "inputs bind"),
    "unbound size": (call(make("iota", size=S, dtype=DType.I64)), r"sizes over \['T'\]"),
    "unbound attribute": (call(make("slice", X, dim=0, start=S, stop=S + 1)), "sizes over"),
    "param in a body": (
        call(fused(Graph("body", (X,), (SUM,), {"w": Stored((4,))}), X)),
        "a body without params",
    ),
    "ill-formed body": (call(fused(Graph("body", (X,), (FORGED,)), X)), "graph body"),
    "ill-formed body of a body": (
        call(fused(Graph("outer", (X,), (fused(Graph("body", (X,), (FORGED,)), X),)), X)),
        "graph body",
    ),
    "body named as a symbol": (call(fused(Graph("T", (X,), (make("exp", X),)), X)), "no symbol's"),
    "two bodies of one name": (
        call(fused(BODY, X), fused(Graph("body", (X,), (make("neg", X),)), X)),
        "one body a name",
    ),
}


@pytest.mark.parametrize(("make_graph", "message"), BAD.values(), ids=BAD.keys())
def test_ill_formed_graphs_are_refused(make_graph, message):
    with pytest.raises(GraphError, match=message):
        verify(make_graph())


def test_good_graphs_pass():
    assert verify(good()) == good()
    verify(Graph("g", (X, Y), (make("add", X, Y), X), {}, ("y", "out")))
    verify(Graph("g", (X,), (fused(BODY, X),)))
    verify(Graph("g", (tensor(2 * T + 1),), (make("iota", size=T, dtype=DType.I64),)))
    verify(Graph("g", (), (const(1.0, DType.F32),)))


@given(graphs())
def test_random_graphs_pass(graph):
    used = {str(n.attr("name")): Stored(n.shape) for n in graph.params}
    verify(graph.with_weights(used))


def test_messages_do_not_hold_whole_bodies():
    body = Graph("body", (X,), (FORGED,))
    with pytest.raises(GraphError) as caught:
        verify(Graph("g", (X,), (fused(body, X),)))
    assert "def " not in str(caught.value)
    assert "def " not in repr(fused(BODY, X))

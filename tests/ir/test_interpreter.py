"""The interpreter: values, bindings, freeing, control flow, ATen calls, errors."""

from __future__ import annotations

import weakref

import pytest
import torch

from tilewright.errors import GraphError
from tilewright.ir.build import input_node, item, make, param
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import bind_symbols, interpret
from tilewright.ir.types import TensorType

pytestmark = pytest.mark.quick

F32, I64 = DType.F32, DType.I64
T = symbol("T")


def tensor(*shape, name="x", dtype=F32):
    return input_node(name, TensorType(dtype, shape))


class Counted:
    """A weight of ones that counts its loads."""

    shape, dtype = (4,), torch.float32

    def __init__(self):
        self.loads = 0

    def load(self):
        self.loads += 1
        return torch.ones(4)


X = tensor(T, 4)
W = param("w", TensorType(F32, (4,)))


def test_a_graph_computes_what_torch_does():
    normed = make("rms_norm", make("add", X, W), W, eps=1e-6)
    total = make("sum", normed, dims=(0,))
    x = torch.randn(3, 4)
    (found,) = interpret(Graph("g", (X,), (total,)), [x], {"w": torch.full((4,), 2.0)})
    want = torch.nn.functional.rms_norm(x + 2, (4,), torch.full((4,), 2.0), 1e-6).sum(0)
    torch.testing.assert_close(found, want)


def test_weights_are_loaded_once_and_inputs_are_left_alone():
    weight = Counted()
    y = make("mul", make("add", make("add", X, W), W), W)
    x = torch.zeros(2, 4)
    (found,) = interpret(Graph("g", (X,), (y,), {"w": weight}), [x])
    assert weight.loads == 1
    assert torch.equal(found, torch.full((2, 4), 2.0)) and torch.equal(x, torch.zeros(2, 4))


def test_inputs_and_params_may_be_outputs():
    x = torch.ones(2, 4)
    out = interpret(Graph("g", (X,), (X, W, X), {"w": Counted()}), [x])
    assert out[0] is x and out[2] is x and torch.equal(out[1], torch.ones(4))


def test_values_are_freed_after_their_last_use():
    node, chain = X, []
    for _ in range(50):
        node = make("neg", node)
        chain.append(node)
    alive: list[weakref.ref] = []

    def watch(node, value):
        alive.append(weakref.ref(value))
        assert sum(r() is not None for r in alive) <= 3

    interpret(Graph("g", (X,), (node,)), [torch.ones(1, 4)], watch=watch)
    assert len(alive) == 51


def test_symbols_are_bound_from_linear_sizes():
    y = tensor(2 * T + 1, name="y")
    graph = Graph("g", (y,), (make("iota", size=T, dtype=I64),))
    assert bind_symbols(graph, [torch.zeros(7)]) == {"T": 3}
    (found,) = interpret(graph, [torch.zeros(7)])
    assert found.tolist() == [0, 1, 2]
    with pytest.raises(GraphError, match="symbol T"):
        interpret(graph, [torch.zeros(6)])


@pytest.mark.parametrize(
    "inputs",
    [[], [torch.ones(2, 4)] * 2, [torch.ones(2, 5)], [torch.ones(4)], [torch.ones(2, 4).half()]],
)
def test_unfit_inputs_are_refused(inputs):
    with pytest.raises(GraphError):
        interpret(Graph("g", (X,), (make("exp", X),)), inputs)


def test_sizes_of_one_name_must_agree():
    graph = Graph("g", (X, tensor(T, name="y")), (make("exp", X),))
    with pytest.raises(GraphError, match="'y'"):
        interpret(graph, [torch.ones(2, 4), torch.ones(3)])


def test_weights_that_lack_or_differ_are_refused():
    graph = Graph("g", (X,), (make("add", X, W),))
    with pytest.raises(GraphError, match="no weight"):
        interpret(graph, [torch.ones(1, 4)])
    for wrong in (torch.ones(1), torch.ones(4).half()):
        with pytest.raises(GraphError, match="param 'w'"):
            interpret(graph, [torch.ones(1, 4)], {"w": wrong})


def test_bounds_that_fail_at_run_time_are_refused():
    graph = Graph("g", (X,), (make("slice", X, dim=0, start=0, stop=5),))
    assert interpret(graph, [torch.ones(6, 4)])[0].shape == (5, 4)
    with pytest.raises(GraphError, match="slice"):
        interpret(graph, [torch.ones(3, 4)])


def test_nested_calls():
    body = Graph("body", (X,), (make("exp", X), make("sum", X, dims=(0,))))
    inner = make("fused", X, body=body, kind="k")
    outer = Graph("outer", (X,), (make("add", item(inner, 0), item(inner, 1)),))
    x = torch.randn(3, 4)
    (found,) = interpret(Graph("g", (X,), (make("fused", X, body=outer, kind="k"),)), [x])
    torch.testing.assert_close(found, x.exp() + x.sum(0))


def test_cond_takes_its_branch():
    flag = tensor(name="flag", dtype=DType.BOOL)
    then, otherwise = (Graph(n, (X,), (make(op, X),)) for n, op in (("a", "exp"), ("b", "neg")))
    node = make("cond", flag, X, then=then, otherwise=otherwise)
    graph, x = Graph("g", (flag, X), (node,)), torch.randn(2, 4)
    assert torch.equal(interpret(graph, [torch.tensor(True), x])[0], x.exp())
    assert torch.equal(interpret(graph, [torch.tensor(False), x])[0], -x)


def _aten(target, *specs, named=(), types=(X.type,)):
    return make("aten", X, target=target, positional=specs, named=named, types=types)


def _run(node, x):
    outputs = (
        tuple(item(node, i) for i in range(len(node.types))) if len(node.types) > 1 else (node,)
    )
    return interpret(Graph("g", (X,), outputs), [x])


def test_aten_calls():
    x = torch.randn(3, 4)
    assert torch.equal(_run(_aten("aten.exp.default", ("t", 0)), x)[0], x.exp())
    both = TensorType(F32, (2 * T, 4))
    cat = _aten("aten.cat.default", ("l", ("t", 0), ("t", 0)), ("v", 0), types=(both,))
    assert torch.equal(_run(cat, x)[0], torch.cat([x, x]))
    halves = _aten(
        "aten.split.Tensor", ("t", 0), ("v", 2), ("v", 1), types=(TensorType(F32, (T, 2)),) * 2
    )
    assert torch.equal(_run(halves, x)[1], x[:, 2:])
    wide = _aten(
        "aten._to_copy.default",
        ("t", 0),
        named=(("dtype", ("v", DType.F64)),),
        types=(TensorType(DType.F64, (T, 4)),),
    )
    assert _run(wide, x)[0].dtype is torch.float64
    rows = _aten("aten.new_zeros.default", ("t", 0), ("l", ("v", T), ("v", 4)))
    assert _run(rows, x)[0].shape == (3, 4)
    clamped = _aten("aten.clamp.default", ("t", 0), ("n",), ("v", 0.0))
    assert torch.equal(_run(clamped, x)[0], x.clamp(max=0.0))


@pytest.mark.parametrize(
    "target",
    [
        "aten.exp",
        "aten.exp.nope",
        "aten.nope.default",
        "no.exp.default",
        "a.b.c.d",
        "aten.exp.name",
    ],
)
def test_unknown_aten_calls_are_refused(target):
    with pytest.raises(GraphError, match="operator"):
        _run(_aten(target, ("t", 0)), torch.ones(1, 4))


def test_aten_calls_that_write_or_lie_are_refused():
    with pytest.raises(GraphError, match="side effects"):
        _run(_aten("aten.exp_.default", ("t", 0)), torch.ones(1, 4))
    with pytest.raises(GraphError, match="aten"):
        _run(
            _aten("aten.exp.default", ("t", 0), types=(TensorType(F32, (T, 5)),)), torch.ones(1, 4)
        )
    with pytest.raises(GraphError, match="aten"):
        _run(_aten("aten.exp.default", ("t", 0), types=(X.type, X.type)), torch.ones(1, 4))


def test_a_deep_graph_runs():
    node = X
    for _ in range(5000):
        node = make("neg", node)
    assert torch.equal(
        interpret(Graph("g", (X,), (node,)), [torch.ones(1, 4)])[0], torch.ones(1, 4)
    )

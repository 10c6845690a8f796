"""Nodes: interned by structure, typed by inference, made whole or not at all."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from tilewright.errors import GraphError
from tilewright.ir.build import cast, const, input_node, item, make, param, permute, reshape
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.types import TensorType

pytestmark = pytest.mark.quick

F32, I64, BOOL, F8 = DType.F32, DType.I64, DType.BOOL, DType.F8E4M3
T = symbol("T")


def tensor(*shape, dtype=F32, name="x"):
    return input_node(name, TensorType(dtype, shape))


X = tensor(3, 4)


def test_equal_structure_is_one_object():
    assert make("add", X, X) is make("add", X, X)
    assert make("exp", tensor(3, 4)) is make("exp", X)
    assert make("rms_norm", X, eps=1e-5) is make("rms_norm", X, None, eps=1e-5)
    assert const(float("nan"), F32) is const(float("nan"), F32)


def test_unequal_attributes_are_different_nodes():
    values = [0.0, -0.0, 1.0, 2.0, float("nan"), float("inf")]
    assert len({const(v, F32) for v in values}) == len(values)
    assert const(1, I64) is not const(True, BOOL)
    assert make("rms_norm", X, eps=1.0) is not make("rms_norm", X, eps=1)


def test_defaults_are_filled_in():
    assert make("sum", X, dims=(0,)) is make("sum", X, dims=(0,), keepdim=False)
    assert make("topk", X, k=1, dim=0).attr("largest") is True
    assert make("gelu", X).attr("approximate") == "none"


def test_attributes_become_plain_values():
    node = make("rms_norm", X, eps=np.float64(0.5))
    assert type(node.attr("eps")) is float
    assert type(make("reshape", X, shape=torch.Size([12])).attr("shape")) is tuple


def test_helpers_make_nothing_that_changes_nothing():
    assert reshape(X, 3, 4) is X and permute(X, 0, 1) is X and cast(X, F32) is X


def test_dead_nodes_leave_the_table():
    from tilewright.ir.node import _interned

    gc.disable()  # they leave at once, not with the next collection
    try:
        before = len(_interned)
        node = X
        for _ in range(20000):
            node = make("neg", node)
        assert len(_interned) == before + 20000
        del node
        assert len(_interned) == before
    finally:
        gc.enable()


H, KV = tensor(2, 4, 5, 8), tensor(2, 2, 5, 8, name="k")
FLAT, NARROW = tensor(6, 4, 8), tensor(6, 2, 8, name="n")
PAGES = tensor(9, 4, 2, 8, name="p")
TABLE, LENGTHS, STARTS = (
    tensor(*s, dtype=DType.I32, name=n) for n, s in (("t", (3, 2)), ("l", (3,)), ("s", (4,)))
)
SLOTS = tensor(3, 2, 16, 8, name="c")

REFUSED = {
    "tuple operand": lambda: make("exp", make("topk", X, k=1, dim=0)),
    "list attribute": lambda: make("reshape", X, shape=[12]),
    "absent variadic": lambda: make("concat", X, None, dim=0),
    "absent operand": lambda: make("add", X, None),
    "numel": lambda: reshape(X, 5),
    "negative numel": lambda: reshape(X, -3, -4),
    "permutation": lambda: make("permute", X, dims=(0, 0)),
    "expand": lambda: make("expand", X, shape=(3, 5)),
    "expand down": lambda: make("expand", X, shape=(4,)),
    "slice past the end": lambda: make("slice", X, dim=0, start=0, stop=4),
    "slice backwards": lambda: make("slice", X, dim=0, start=2, stop=1),
    "symbolic slice past the end": lambda: make("slice", tensor(T), dim=0, start=0, stop=T + 1),
    "slice step": lambda: make("slice", X, dim=0, start=0, stop=1, step=-1),
    "slice dim": lambda: make("slice", X, dim=-1, start=0, stop=1),
    "concat nothing": lambda: make("concat", dim=0),
    "concat dim": lambda: make("concat", X, X, dim=-1),
    "concat shapes": lambda: make("concat", X, tensor(3, 5), dim=0),
    "concat types": lambda: make("concat", X, tensor(3, 4, dtype=I64), dim=0),
    "pad rank": lambda: make("pad", X, pads=((0, 0),), value=0.0),
    "pad below nothing": lambda: make("pad", X, pads=((-4, 0), (0, 0)), value=0.0),
    "flip": lambda: make("flip", X, dims=(2,)),
    "gather rank": lambda: make("gather", X, tensor(3, dtype=I64), dim=0),
    "gather wider": lambda: make("gather", X, tensor(3, 5, dtype=I64), dim=0),
    "gather floats": lambda: make("gather", X, X, dim=0),
    "index_select floats": lambda: make("index_select", X, X, dim=0),
    "embedding": lambda: make("embedding", tensor(3), tensor(3, dtype=I64)),
    "mixed types": lambda: make("add", X, tensor(3, 4, dtype=I64)),
    "broadcast": lambda: make("add", X, tensor(5)),
    "broadcast symbols": lambda: make("add", tensor(T), tensor(symbol("S"))),
    "exp of integers": lambda: make("exp", tensor(2, dtype=I64)),
    "div of integers": lambda: make("div", tensor(2, dtype=I64), tensor(2, dtype=I64)),
    "float8 arithmetic": lambda: make("add", tensor(2, dtype=F8), tensor(2, dtype=F8)),
    "neg of booleans": lambda: make("neg", tensor(2, dtype=BOOL)),
    "logic on integers": lambda: make("logical_not", tensor(2, dtype=I64)),
    "where": lambda: make("where", X, X, X),
    "gelu": lambda: make("gelu", X, approximate="no"),
    "complex to real": lambda: cast(tensor(2, dtype=DType.C64), F32),
    "reduce twice": lambda: make("sum", X, dims=(0, 0)),
    "reduce beyond": lambda: make("sum", X, dims=(2,)),
    "reduce from the end": lambda: make("sum", X, dims=(-1,)),
    "mean of integers": lambda: make("mean", tensor(2, dtype=I64), dims=(0,)),
    "softmax dim": lambda: make("softmax", X, dim=2),
    "cumsum dim": lambda: make("cumsum", X, dim=-1),
    "topk": lambda: make("topk", X, k=5, dim=1),
    "matmul": lambda: make("matmul", X, X),
    "matmul vector": lambda: make("matmul", X, tensor(4)),
    "linear": lambda: make("linear", X, tensor(5, 3)),
    "linear bias": lambda: make("linear", X, tensor(5, 4), tensor(4)),
    "linear bias type": lambda: make("linear", X, tensor(5, 4), tensor(5, dtype=DType.F64)),
    "norm weight": lambda: make("rms_norm", X, tensor(3), eps=1e-5),
    "norm of a scalar": lambda: make("rms_norm", tensor(), eps=1e-5),
    "norm without eps": lambda: make("rms_norm", X),
    "rope width": lambda: make("rope", X, tensor(3, 3), tensor(3, 3)),
    "rope grows": lambda: make("rope", X, tensor(7, 3, 2), tensor(7, 3, 2)),
    "rope layout": lambda: make("rope", X, tensor(3, 2), tensor(3, 2), layout="other"),
    "gated": lambda: make("gated", X, X, activation="cosh"),
    "heads": lambda: make("attention", tensor(2, 3, 5, 8), KV, KV, scale=1.0),
    "attention rank": lambda: make("attention", FLAT, FLAT, FLAT, scale=1.0),
    "mask shape": lambda: make("attention", H, KV, KV, tensor(5, 6), scale=1.0),
    "mask rank": lambda: make("attention", H, KV, KV, tensor(3, 1, 1, 5, 5), scale=1.0),
    "mask type": lambda: make("attention", H, KV, KV, tensor(5, 5, dtype=I64), scale=1.0),
    "sinks": lambda: make("attention", H, KV, KV, None, tensor(2), scale=1.0),
    "alibi": lambda: make("attention", H, KV, KV, None, None, tensor(2), scale=1.0),
    "window": lambda: make("attention", H, KV, KV, scale=1.0, window=0),
    "no scale": lambda: make("attention", H, KV, KV),
    "kv_write slots": lambda: make("kv_write", PAGES, NARROW, tensor(5, dtype=I64)),
    "kv_write type": lambda: make("kv_write", PAGES, tensor(6, 2, 8, dtype=DType.F16), LENGTHS),
    "paged tables": lambda: make(
        "paged_attention", FLAT, PAGES, PAGES, LENGTHS, LENGTHS, STARTS, scale=1.0
    ),
    "paged starts": lambda: make(
        "paged_attention", FLAT, PAGES, PAGES, TABLE, LENGTHS, LENGTHS, scale=1.0
    ),
    "paged rank": lambda: make(
        "paged_attention", H, PAGES, PAGES, TABLE, LENGTHS, STARTS, scale=1.0
    ),
    "slot lengths": lambda: make(
        "slot_attention", FLAT, NARROW, NARROW, SLOTS, SLOTS, STARTS, scale=1.0
    ),
    "slot caches": lambda: make(
        "slot_attention", FLAT, NARROW, NARROW, SLOTS, PAGES, LENGTHS, scale=1.0
    ),
    "const type": lambda: make("const", value=1, dtype=F32),
    "const range": lambda: const(256, DType.U8),
    "const part": lambda: const(0.5, I64),
    "iota": lambda: make("iota", size=3, dtype=BOOL),
    "item of one": lambda: item(X, 0),
    "item beyond": lambda: item(make("topk", X, k=1, dim=0), 2),
    "input name": lambda: input_node("a.b", X.type),
    "param type": lambda: param("w", "f32"),
    "cond predicate": lambda: make("cond", X, X, then=IDENTITY, otherwise=IDENTITY),
    "cond results": lambda: make("cond", const(True, BOOL), X, then=IDENTITY, otherwise=SUMS),
    "fused operands": lambda: make("fused", tensor(5), body=IDENTITY, kind="k"),
    "aten operand": lambda: make(
        "aten", X, target="aten.exp.default", positional=(("t", 1),), named=(), types=(X.type,)
    ),
    "aten tag": lambda: make(
        "aten", X, target="aten.exp.default", positional=(("q", 1),), named=(), types=(X.type,)
    ),
}
IDENTITY = Graph("identity", (X,), (X,))
SUMS = Graph("sums", (X,), (make("sum", X, dims=(0,)),))


@pytest.mark.parametrize("attempt", REFUSED.values(), ids=REFUSED.keys())
def test_ill_typed_nodes_are_refused(attempt):
    with pytest.raises(GraphError):
        attempt()


def test_moe_is_refused_piece_by_piece():
    ids, weights = tensor(3, 2, dtype=I64), tensor(3, 2)
    gate_up, down = tensor(5, 12, 4), tensor(5, 4, 6)

    def moe(*args, activation="silu"):
        return make("moe_experts", *args, activation=activation)

    assert moe(X, ids, weights, gate_up, down).type == X.type
    for wrong in (
        (X, ids, weights, tensor(5, 6, 4), down),
        (X, ids, weights, gate_up, tensor(4, 4, 6)),
        (X, weights, weights, gate_up, down),
        (X, tensor(4, 2, dtype=I64), tensor(4, 2), gate_up, down),
        (X, ids, weights, gate_up, down, tensor(5, 4)),
        (X, ids, weights, gate_up, down, None, tensor(5, 12)),
        (tensor(3, 4, dtype=DType.F16), ids, weights, gate_up, down),
    ):
        with pytest.raises(GraphError):
            moe(*wrong)
    with pytest.raises(GraphError):
        moe(X, ids, weights, gate_up, down, activation="no")


def test_symbolic_slices_that_may_fit_are_taken():
    x = tensor(T, 4)
    assert make("slice", x, dim=0, start=T - 1, stop=T).shape == (1, 4)
    assert make("slice", x, dim=0, start=1, stop=T, step=2).shape == (T // 2, 4)


def test_convolution_over_symbolic_lengths():
    attrs = {"stride": (2,), "padding": (1,), "dilation": (1,), "groups": 1}
    x, weight = tensor(1, 4, T), tensor(6, 4, 3)
    assert str(make("conv", x, weight, **attrs).shape) == "(1, 6, (T + 1) // 2)"
    for wrong in (tensor(6, 2, 3), tensor(6, 4, 3, 3), tensor(6, 4, 3, dtype=DType.F16)):
        with pytest.raises(GraphError):
            make("conv", x, wrong, **attrs)

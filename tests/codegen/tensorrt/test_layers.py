"""Single ops as layers, beside the ops' own references."""

from __future__ import annotations

import pytest
import torch

from onnx_running import Held
from tensorrt_running import network_of, run_batch
from tilewright.codegen.tensorrt.network import Network
from tilewright.codegen.tensorrt.writer import Refusal
from tilewright.ir.build import cast, const, input_node, item, make, param, reshape
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType

F32, I64 = DType.F32, DType.I64
T, B, L = map(symbol, "TBL")
BATCH, LENGTH, ROOM = 2, 3, 8


def tokens(name: str, *shape: int, dtype: DType = F32) -> Node:
    return input_node(name, TensorType(dtype, (T, *shape)))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def agrees(result: Node, *inputs: Node, weights: dict[str, torch.Tensor] | None = None) -> None:
    """The layers of ``result`` give what its reference gives."""
    held = {name: Held(tensor) for name, tensor in (weights or {}).items()}
    graph = Graph("op", inputs, (result,), weights=held)
    network = network_of(graph, ROOM)
    assert isinstance(network, Network), network
    given = [
        numbers(BATCH * LENGTH, *map(int, node.shape[1:]), seed=i) for i, node in enumerate(inputs)
    ]
    (wanted,) = interpret(graph, given)
    (found,) = run_batch(network, graph, given, BATCH, [0, 0])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def refused(result: Node, *inputs: Node) -> str:
    found = network_of(Graph("op", inputs, (result,)), ROOM)
    assert isinstance(found, Refusal)
    return found.reason


X, Y = tokens("x", 4, 6), tokens("y", 4, 6)


@pytest.mark.parametrize(
    "op",
    [
        *("neg", "abs", "exp", "sin", "cos", "erf", "floor", "ceil"),
        *("tanh", "sigmoid", "relu", "silu", "reciprocal"),
    ],
)
def test_of_one_operand(op: str) -> None:
    agrees(make(op, X), X)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "maximum", "minimum"])
def test_of_two_operands(op: str) -> None:
    agrees(make(op, X, Y), X, Y)
    agrees(make(op, X, const(2.5, F32)), X)


@pytest.mark.parametrize("op", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons(op: str) -> None:
    agrees(make("where", make(op, X, Y), X, make("neg", Y)), X, Y)


def test_moving() -> None:
    cut = make("slice", X, dim=2, start=1, stop=6, step=2)
    agrees(cut, X)
    agrees(make("permute", X, dims=(0, 2, 1)), X)
    agrees(reshape(X, T, 24), X)
    agrees(make("concat", X, make("neg", Y), dim=1), X, Y)


def test_reducing() -> None:
    for op in ("sum", "mean", "amax", "amin"):
        agrees(make(op, X, dims=(2,), keepdim=True), X)
    agrees(make("softmax", X, dim=2), X)
    agrees(make("gelu", X, approximate="tanh"), X)
    agrees(make("rsqrt", make("exp", X)), X)


def test_norms() -> None:
    ones = make("expand", const(1.5, F32), shape=(6,))
    agrees(make("rms_norm", X, ones, eps=1e-5), X)
    agrees(make("rms_norm", X, eps=1e-5), X)
    agrees(make("layer_norm", X, ones, eps=1e-5), X)
    agrees(make("layer_norm", X, ones, ones, eps=1e-5), X)
    agrees(make("gated", X, Y, activation="gelu"), X, Y)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_part_of_the_width_is_rotated(layout: str) -> None:
    positions = input_node("positions", TensorType(I64, (T,)))
    angles = make("mul", cast(reshape(positions, T, 1, 1), F32), const(0.3, F32))
    wide = make("expand", const(1.0, F32), shape=(1, 1, 2))
    angles = make("mul", angles, wide)
    turned = make("rope", X, make("cos", angles), make("sin", angles), layout=layout)
    graph = Graph("op", (X, positions), (turned,))
    network = network_of(graph, ROOM)
    assert isinstance(network, Network), network
    x, starts = numbers(BATCH * LENGTH, 4, 6), [2, 4]
    places = torch.tensor([start + i for start in starts for i in range(LENGTH)])
    (wanted,) = interpret(graph, [x, places])
    (found,) = run_batch(network, graph, [x, places], BATCH, starts)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "attrs",
    [{}, {"window": 2}, {"softcap": 1.5}, {"softcap": 1.5, "window": 3}, {"alibi": True}],
)
def test_attention_over_slots(attrs: dict[str, object]) -> None:
    heads, groups, width = 4, 2, 8
    attrs = dict(attrs)
    slopes = [0.5, 0.25, 0.125, 0.0625]
    alibi = None
    if attrs.pop("alibi", False):
        parts = [reshape(const(slope, F32), 1) for slope in slopes]
        alibi = make("concat", *parts, dim=0)
    new = [tokens("q", heads, width), tokens("k", groups, width), tokens("v", groups, width)]
    caches = [input_node(f"{n}_cache_0", TensorType(F32, (B, groups, L, width))) for n in "kv"]
    lens = input_node("seq_lens", TensorType(DType.I32, (B,)))
    call = make("slot_attention", *new, *caches, lens, None, alibi, scale=0.4, **attrs)
    graph = Graph("op", (*new, *caches, lens), tuple(item(call, i) for i in range(3)))
    network = network_of(graph, ROOM)
    assert isinstance(network, Network), network
    starts = [4, 0]
    given = [numbers(BATCH * LENGTH, *map(int, n.shape[1:]), seed=i) for i, n in enumerate(new)]
    given += [numbers(BATCH, groups, ROOM, width, seed=9 + i) for i in range(2)]
    given.append(torch.tensor([start + LENGTH for start in starts], dtype=torch.int32))
    wanted = interpret(graph, given)
    found = run_batch(network, graph, given, BATCH, starts)
    torch.testing.assert_close(tuple(found), tuple(wanted), atol=1e-5, rtol=1e-5)


def test_products_of_static_scales() -> None:
    """FP8 with one scale of x, and one of the weight."""
    x = tokens("x", 16)
    weights = {
        "w.codes": (numbers(8, 16, seed=3) * 60).to(torch.float8_e4m3fn),
        "w.scale": torch.tensor([[0.02]]),
        "w.input_scale": torch.tensor([0.01]),
    }
    params = {
        name: param(name, TensorType(DType.from_torch(value.dtype), tuple(value.shape)))
        for name, value in weights.items()
    }
    codes, scale, static = params.values()
    rows = make("quantize_rows", x, static, dtype=DType.F8E4M3, group=0)
    product = make("scaled_linear", item(rows, 0), static, codes, scale, dtype=F32, rows=0, group=0)
    agrees(product, x, weights=weights)


def test_what_has_no_layer() -> None:
    flat = tokens("f", 4)
    assert refused(make("cumsum", X, dim=1), X) == "no layer computes it"
    assert "tokens" in refused(make("permute", X, dims=(1, 0, 2)), X)
    assert refused(make("slice", X, dim=0, start=0, stop=1, step=1), X)
    assert "over tokens" in refused(make("softmax", X, dim=0), X)
    assert "arithmetic" in refused(make("add", make("eq", X, Y), make("eq", X, Y)), X, Y)
    assert "made at run time" in refused(
        item(make("quantize_rows", flat, dtype=DType.I8, group=0), 0), flat
    )

"""Every op of the IR by itself, in float32, against its reference; and who refuses what."""

from __future__ import annotations

import pytest
import torch

from onnx_running import Held, Running, running
from tilewright.codegen.onnx.table import CONVERTERS, WITHOUT
from tilewright.ir.build import input_node, item, make, param
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.schema import Sample, all_schemas, schema
from tilewright.ir.types import TensorType

OPS = [
    (spec.name, index)
    for spec in all_schemas()
    for index in range(len(spec.samples(torch.Generator().manual_seed(0))))
]
LEAVES = {"input", "param", "const", "item"}
KEPT_WEIGHTS = {"moe_experts": 3, "linear": 1, "conv": 1, "rms_norm": 1, "layer_norm": 1}


def single(tensor: torch.Tensor | None) -> torch.Tensor | None:
    wide = tensor is not None and tensor.is_floating_point() and tensor.itemsize > 1
    return tensor.float() if wide else tensor  # 8-bit floats are codes


def type_of(tensor: torch.Tensor) -> TensorType:
    return TensorType(DType.from_torch(tensor.dtype), tuple(tensor.shape))


def one_op(name: str, sample: Sample) -> tuple[Graph, list[torch.Tensor]]:
    """The op over inputs, or over params from the operand on where its weights begin."""
    nodes: list[Node | None] = []
    given: list[torch.Tensor] = []
    weights: dict[str, Held] = {}
    for index, tensor in enumerate(map(single, sample.args)):
        if tensor is None:
            nodes.append(None)
        elif index >= KEPT_WEIGHTS.get(name, 99):
            weights[f"w{index}"] = Held(tensor)
            nodes.append(param(f"w{index}", type_of(tensor)))
        else:
            given.append(tensor)
            nodes.append(input_node(f"x{index}", type_of(tensor)))
    node = make(name, *nodes, **sample.attrs)
    count = len(node.types)
    outputs = (node,) if count == 1 else tuple(item(node, i) for i in range(count))
    inputs = tuple(n for n in nodes if n is not None and n.op == "input")
    return Graph("g", inputs, outputs, weights), given


@pytest.mark.quick
@pytest.mark.parametrize(("name", "index"), OPS)
def test_op_gives_what_its_reference_gives(name: str, index: int) -> None:
    sample = schema(name).samples(torch.Generator().manual_seed(0))[index]
    graph, inputs = one_op(name, sample)
    engine = Running(graph)
    engine.check(inputs)
    in_float8 = any(t.dtype.is_float8 for n in graph.nodes for t in n.types)
    if inputs and name not in WITHOUT and not in_float8:
        assert engine.whole, engine.lowered.notes


def test_every_op_is_converted_or_refused() -> None:
    names = {spec.name for spec in all_schemas()}
    assert set(WITHOUT) == {
        "aten",
        "append_kv",
        "scaled_append_kv",
        "scaled_paged_attention",
        "dequantize",
        "kv_write",
        "paged_attention",
        "sample",
        "share_pages",
    }
    assert names - set(CONVERTERS) == WITHOUT | LEAVES


@pytest.mark.parametrize(
    ("op", "values"),
    [
        ("floor", [1.5, -1.5, 0.0]),
        ("round", [0.5, 1.5, -2.5]),
        ("log1p", [1e-9, -1e-9, 0.5, 1e30, 0.0, -1.0]),
        ("isnan", [float("nan"), 1.0, float("inf")]),
        ("sign", [-2.0, 0.0, 3.0]),
        ("relu", [-1.0, 0.0, float("nan")]),
    ],
)
def test_unary_edges(op: str, values: list[float]) -> None:
    result = "bool" if op == "isnan" else "f32"
    n = len(values)
    engine = running(
        f'def g(x: f32[{n}]):\n    y: {result}[{n}] = {op}(x)\n    return {{"y": y}}\n'
    )
    engine.check([torch.tensor(values)])


@pytest.mark.parametrize("op", ["remainder", "floordiv", "maximum", "minimum", "pow"])
def test_binary_edges_of_floats(op: str) -> None:
    a = torch.tensor([1.0, -1.0, 7.0, -7.0, 5.5, 0.0, float("nan"), 1.0])
    b = torch.tensor([0.1, 0.1, 3.0, 3.0, -2.0, 4.0, 1.0, float("nan")])
    text = f'def g(a: f32[8], b: f32[8]):\n    y: f32[8] = {op}(a, b)\n    return {{"y": y}}\n'
    running(text).check([a, b])


@pytest.mark.parametrize("op", ["remainder", "floordiv", "floor", "neg", "add", "maximum", "lt"])
@pytest.mark.parametrize("dtype", ["i64", "i32"])
def test_integers(op: str, dtype: str) -> None:
    binary = op not in ("floor", "neg")
    operand = f", {dtype}(3)" if binary else ""
    result = "bool" if op == "lt" else dtype
    text = f'def g(x: {dtype}[5]):\n    y: {result}[5] = {op}(x{operand})\n    return {{"y": y}}\n'
    values = torch.tensor([-7, -3, 0, 4, 3])
    running(text).check([values if dtype == "i64" else values.int()])


def test_an_integer_divisor_that_may_be_0_is_refused() -> None:
    text = 'def g(a: i64[2], b: i64[2]):\n    y: i64[2] = remainder(a, b)\n    return {"y": y}\n'
    engine = running(text)
    assert engine.kernels == ["eager/remainder"]
    assert "divisor" in engine.lowered.notes[0]
    engine.check([torch.tensor([7, -7]), torch.tensor([3, 3])])


@pytest.mark.parametrize("op", ["add", "mul", "maximum", "minimum", "lt", "ge", "eq"])
def test_booleans(op: str) -> None:
    text = f'def g(a: bool[4], b: bool[4]):\n    y: bool[4] = {op}(a, b)\n    return {{"y": y}}\n'
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    running(text).check([a, b])


def test_bfloat16_matmul_runs_on_eager_with_a_reason() -> None:
    text = (
        "def g(x: bf16[2, 4], w: bf16[3, 4]):\n"
        '    y: bf16[2, 3] = linear(x, w)\n    return {"y": y}\n'
    )
    engine = running(text)
    assert engine.kernels == ["eager/linear"]
    assert "linear" in engine.lowered.notes[0]
    engine.check([torch.randn(2, 4).bfloat16(), torch.randn(3, 4).bfloat16()])


@pytest.mark.parametrize("mask", ["bool", "f32"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_masks_with_rows_that_see_nothing(mask: str, causal: bool) -> None:
    text = (
        "def g(q: f32[2, 4, S, 8], k: f32[2, 2, S, 8], v: f32[2, 2, S, 8], "
        f"m: {mask}[2, 1, S, S]):\n"
        f"    y: f32[2, 4, S, 8] = attention(q, k, v, m, scale=0.3, causal={causal})\n"
        '    return {"y": y}\n'
    )
    engine = running(text)
    assert engine.whole
    for size in (3, 6):
        allowed = torch.rand(2, 1, size, size) > 0.4
        allowed[1, 0, 0] = False
        given = (
            allowed
            if mask == "bool"
            else torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        )
        q, k, v = (torch.randn(2, heads, size, 8) for heads in (4, 2, 2))
        engine.check([q, k, v, given])


def test_cross_attention_aligns_the_last_query_with_the_last_key() -> None:
    text = (
        "def g(q: f32[1, 2, 2, 8], k: f32[1, 2, 5, 8], v: f32[1, 2, 5, 4]):\n"
        "    y: f32[1, 2, 2, 4] = attention(q, k, v, scale=0.3, causal=True)\n"
        '    return {"y": y}\n'
    )
    shapes = ((1, 2, 2, 8), (1, 2, 5, 8), (1, 2, 5, 4))
    running(text).check([torch.randn(shape) for shape in shapes])

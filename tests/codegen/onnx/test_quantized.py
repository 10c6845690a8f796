"""Products of quantized weights: packed codes, int8 activations, and what has no kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_running import Held, Running
from tilewright.ir.build import input_node, item, make, param
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Attr, Node
from tilewright.ir.ops.quant import blocks, packed_width
from tilewright.ir.types import TensorType

ROWS, COUNT = 5, 19
# Largest error over largest result: float32's own, and that of 255 steps over each row's range.
EXACT, ROUNDED = 4e-6, 0.02


def product_of(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dtype: DType = DType.F32,
    **attrs: Attr,
) -> Running:
    """``linear(x, dequantize(codes, scale, zero), bias)`` for x [T, K]."""
    held = {"codes": codes, "scale": scale, "zero": zero, "bias": bias}
    given_ = {name: tensor for name, tensor in held.items() if tensor is not None}
    parts = {name: _param(name, tensor) for name, tensor in given_.items()}
    weight = make(
        "dequantize", parts["codes"], parts["scale"], parts.get("zero"), dtype=dtype, **attrs
    )
    x = input_node("x", TensorType(dtype, (symbol("T"), weight.shape[1])))
    result = make("linear", x, weight, parts.get("bias"))
    return Running(Graph("g", (x,), (result,), {n: Held(t) for n, t in given_.items()}))


def _param(name: str, tensor: torch.Tensor) -> Node:
    return param(name, TensorType(DType.from_torch(tensor.dtype), tuple(tensor.shape)))


def four_bit(width: int, group: int, zeros: bool, **attrs: Attr) -> Running:
    """Random codes and scales, [COUNT, width]."""
    number = blocks(width, group)
    codes = torch.randint(0, 256, (COUNT, packed_width(width, group)), dtype=torch.uint8)
    zero = torch.randint(0, 16, (COUNT, number), dtype=torch.uint8) if zeros else None
    bias = torch.randn(COUNT) if zeros else None
    scale = (torch.rand(COUNT, number) + 0.1).bfloat16()
    return product_of(codes, scale, zero, bias, group=group, width=width, **attrs)


def eight_bit(width: int, group: int, **attrs: Attr) -> Running:
    """Random codes and scales, [COUNT, width]."""
    codes = torch.randint(-127, 128, (COUNT, width), dtype=torch.int8)
    scale = torch.rand(COUNT, blocks(width, group)) + 0.1
    return product_of(codes, scale, group=group, **attrs)


def error(engine: Running, count: int = ROWS) -> float:
    """The largest error against float64, over the largest result."""
    x = torch.randn(count, engine.graph.inputs[0].shape[1])  # type: ignore[arg-type]
    (linear,) = engine.graph.outputs
    weight, bias = linear.operands[1], linear.args[2]
    values = [weight] if bias is None else [weight, bias]
    found = interpret(Graph("w", (), tuple(values), engine.graph.weights), [], engine.weights)
    truth = torch.nn.functional.linear(x.double(), *(value.double() for value in found))
    (result,) = engine.run([x]).values()
    return float((result - truth).abs().max() / truth.abs().max())


def op_types(engine: Running) -> list[str]:
    import onnx

    (model,) = engine.lowered.files.values()
    return [node.op_type for node in onnx.ModelProto.FromString(model).graph.node]


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 300),
    group=st.sampled_from([0, 16, 32, 48, 64, 128, 512]),
    zeros=st.booleans(),
    compute=st.sampled_from([None, DType.I8]),
)
def test_four_bits_stay_packed(width: int, group: int, zeros: bool, compute: DType | None) -> None:
    engine = four_bit(width, group, zeros, compute=compute)
    assert engine.whole and op_types(engine) == ["MatMulNBits"] and not engine.lowered.notes
    for rows in (1, ROWS):
        assert error(engine, rows) < (ROUNDED if compute else EXACT)


@settings(max_examples=15, deadline=None)
@given(width=st.integers(1, 300), group=st.sampled_from([0, 32, 128]))
def test_eight_bits_stay_packed(width: int, group: int) -> None:
    engine = eight_bit(width, group, compute=DType.I8)
    assert engine.whole and op_types(engine) == ["MatMulNBits"]
    for rows in (1, ROWS):
        assert error(engine, rows) < ROUNDED


def test_what_is_rounded_differs_from_what_is_not() -> None:
    assert error(four_bit(128, 32, zeros=False, compute=DType.I8)) > 10 * EXACT


@settings(max_examples=15, deadline=None)
@given(
    width=st.integers(1, 200),
    group=st.sampled_from([0, 16, 32, 128]),
    eight=st.booleans(),
    compute=st.booleans(),
    seed=st.integers(0, 9),
)
def test_zero_points_between_codes(
    width: int, group: int, eight: bool, compute: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    number = blocks(width, group)
    codes = (
        torch.randint(-128, 128, (COUNT, width), dtype=torch.int8)
        if eight
        else torch.randint(0, 256, (COUNT, packed_width(width, group)), dtype=torch.uint8)
    )
    scale, zero = torch.rand(COUNT, number) + 0.1, torch.randn(COUNT, number) * 15
    attrs: dict[str, Attr] = {"group": group, "compute": DType.I8 if compute or eight else None}
    engine = product_of(
        codes, scale, zero, torch.randn(COUNT), **attrs, width=None if eight else width
    )
    assert engine.whole and not engine.lowered.notes
    assert {"MatMulNBits", "ReduceSum", "Gemm"} <= {*op_types(engine)}
    for rows in (1, ROWS):
        assert error(engine, rows) < (ROUNDED if compute or eight else EXACT)


def test_zero_points_between_codes_behind_more_axes() -> None:
    codes = torch.randint(0, 256, (COUNT, 32), dtype=torch.uint8)
    scale, zero = torch.rand(COUNT, 2) + 0.1, torch.rand(COUNT, 2) * 15
    weights = {"codes": codes, "scale": scale, "zero": zero}
    parts = [_param(name, tensor) for name, tensor in weights.items()]
    x = input_node("x", TensorType(DType.F32, (2, symbol("T"), 64)))
    weight = make("dequantize", *parts, dtype=DType.F32, group=32, width=64)
    held = {name: Held(tensor) for name, tensor in weights.items()}
    engine = Running(Graph("g", (x,), (make("linear", x, weight),), held))
    assert "MatMulNBits" in op_types(engine)
    engine.check([torch.randn(2, 3, 64)], 1e-5)


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        (lambda: four_bit(64, 8, zeros=False), "groups of 8"),
        (lambda: eight_bit(64, 0), "compute in int8 are faster"),
        (lambda: eight_bit(64, 32, dtype=DType.F64), "not in float32"),
        (
            lambda: product_of(
                torch.randn(COUNT, 64).to(torch.float8_e4m3fn), torch.rand(COUNT, 1) + 0.1
            ),
            "no kernel",
        ),
        (
            lambda: product_of(
                torch.randint(-9, 9, (COUNT, 64)).to(torch.int8),
                torch.ones(1, 1),
                rows=0,
                compute=DType.I8,
            ),
            "several rows",
        ),
    ],
    ids=["group", "float", "float64", "float8", "tensor"],
)
def test_what_has_no_kernel_is_expanded_with_a_note(engine, told: str) -> None:
    made: Running = engine()
    assert any(told in note for note in made.lowered.notes), made.lowered.notes
    assert "MatMulNBits" not in op_types(made)
    made.check([torch.randn(ROWS, 64).to(made.graph.inputs[0].dtype.torch)], 1e-4)


def int8_product(static: bool = False) -> Running:
    """``scaled_linear(quantize_rows(x), codes, scale, bias)`` for x [T, 96]."""
    x = input_node("x", TensorType(DType.F32, (symbol("T"), 96)))
    weights = {
        "codes": torch.randint(-127, 128, (COUNT, 96), dtype=torch.int8),
        "scale": torch.rand(COUNT, 1),
        "bias": torch.randn(COUNT),
        "static": torch.tensor([0.05]),
    }
    codes, scale, bias, given_ = (_param(name, tensor) for name, tensor in weights.items())
    rows = make("quantize_rows", x, given_ if static else None, dtype=DType.I8)
    result = make(
        "scaled_linear", item(rows, 0), item(rows, 1), codes, scale, bias, dtype=DType.F32
    )
    return Running(Graph("g", (x,), (result,), {n: Held(t) for n, t in weights.items()}))


def test_rows_of_int8_are_each_their_own() -> None:
    engine = int8_product()
    assert engine.whole and op_types(engine) == ["MatMulNBits"]
    x = torch.randn(3, 96)
    x[1] *= 1e6  # a scale of the whole batch would leave nothing of the others
    x[2] = 0
    (together,) = engine.run([x]).values()
    (alone,) = engine.run([x[:1]]).values()
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-4)
    assert torch.equal(together[2], engine.weights["bias"])


def test_int8_is_nearer_to_the_truth_than_whole_rows_are() -> None:
    engine, x = int8_product(), torch.randn(32, 96)
    weights = engine.weights
    truth = x.double() @ (weights["codes"].double() * weights["scale"]).T + weights["bias"]
    (found,) = engine.run([x]).values()
    (by_rows,) = interpret(engine.graph, [x], weights)
    assert (found - truth).norm() <= (by_rows - truth).norm()


def test_a_static_scale_is_kept_to() -> None:
    engine = int8_product(static=True)
    assert engine.whole and "MatMulInteger" in op_types(engine)
    engine.check([torch.randn(ROWS, 96)], 1e-5)


def test_codes_of_rows_are_the_references() -> None:
    x = input_node("x", TensorType(DType.F32, (symbol("T"), 96)))
    rows = make("quantize_rows", x, dtype=DType.I8)
    engine = Running(Graph("g", (x,), (item(rows, 0), item(rows, 1))))
    assert engine.whole
    values = torch.randn(4, 96)
    values[1] *= 1e6
    values[2] = 0
    values[3, 5] = float("nan")
    engine.check([values], 1e-6)

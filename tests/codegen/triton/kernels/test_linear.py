"""Decode linears in Triton against their bodies in float64: every prologue and epilogue, any number
of tokens, odd sizes, parts of a product that are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tilewright.codegen.triton.kernels.linear import emit_linear, linear_source
from tilewright.codegen.triton.kernels.linear_tiles import (
    GemmTiles,
    GemvTiles,
    Problem,
    default_gemm,
    default_gemv,
    shared_bytes,
)
from tilewright.codegen.triton.layout import located
from tilewright.ir.build import const, input_node, make
from tilewright.ir.dims import Size, evaluate, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS
from triton_running import compile_for, run_interpreted

H100 = TARGETS["h100"]
B = symbol("B")
# Of the largest magnitude: the product, and each op behind it, are rounded to the element type.
ERROR = {DType.F32: 1e-5, DType.F16: 4e-3, DType.BF16: 3e-2}
# Shrinking interpreted kernels takes minutes, and the first failure says enough.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
SMALL_GEMV, SMALL_GEMM = GemvTiles(2, 32, 1), GemmTiles(16, 16, 16, 2, 2)


@dataclass(frozen=True)
class Form:
    """What is static in a product: sizes, what stands before it, and what behind it."""

    k: int = 48
    n: int = 24
    dtype: DType = DType.F32
    norm: str = "none"  # "weight", "bare"
    bias: bool = False
    halves: bool = False
    behind: tuple[str, ...] = ()
    strided: bool = False

    @property
    def rows(self) -> int:
        """Of the weight."""
        return self.n * (2 if self.halves else 1)


def tensor(name: str, dtype: DType, *shape: Size) -> Node:
    return input_node(name, TensorType(dtype, shape))


def body_of(form: Form) -> Graph:
    x = tensor("x", form.dtype, B, form.k)
    inputs, value = [x], x
    if form.norm != "none":
        scale = tensor("scale", DType.F32, form.k) if form.norm == "weight" else None
        inputs += [] if scale is None else [scale]
        value = make("rms_norm", x, scale, eps=1e-5)
    weight = tensor("weight", form.dtype, form.rows, form.k)
    bias = tensor("bias", form.dtype, form.rows) if form.bias else None
    inputs += [weight, *([] if bias is None else [bias])]
    value = make("linear", value, weight, bias)
    if form.halves:
        first, second = (
            make("slice", value, dim=1, start=s, step=1, stop=s + form.n) for s in (0, form.n)
        )
        value = make("gated", first, second, activation="gelu_tanh")
    for index, step in enumerate(form.behind):
        value = STEPS[step](value, inputs, form, f"r{index}")
    return Graph("body", tuple(inputs), (value,))


def _beside(value: Node, inputs: list[Node], form: Form, name: str, *shape: Size) -> Node:
    inputs.append(tensor(name, form.dtype, *shape))
    return make("add", inputs[-1], value)


STEPS = {
    "residual": lambda v, i, f, name: _beside(v, i, f, name, B, f.n),
    "columns": lambda v, i, f, name: _beside(v, i, f, name, f.n),
    "rows": lambda v, i, f, name: _beside(v, i, f, name, B, 1),
    "scaled": lambda v, i, f, name: make("mul", v, const(0.37, f.dtype)),
    "gelu": lambda v, i, f, name: make("gelu", v),
    "capped": lambda v, i, f, name: make("tanh", v),
    "square": lambda v, i, f, name: make("mul", v, v),
}


def node_of(form: Form) -> Node:
    """The call: x a part of wider rows where it is strided."""
    body = body_of(form)
    outer = [input_node(f"outer_{i}", n.type) for i, n in enumerate(body.inputs)]
    if form.strided:
        wide = tensor("wide", form.dtype, B, form.k + 8)
        outer[0] = make("slice", wide, dim=1, start=8, step=1, stop=form.k + 8)
    return make("fused", *outer, body=body, kind="linear")


def problem_of(node: Node) -> Problem | None:
    return Problem.of(node, tuple(located(operand)[1] for operand in node.operands))


def in_float64(body: Graph, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    values: dict[Node, Node] = {}
    for node in body.nodes:
        if node.op == "input":
            values[node] = tensor(str(node.attr("name")), DType.F64, *node.shape)
        elif node.op == "const":
            values[node] = const(node.attr("value"), DType.F64)  # type: ignore[arg-type]
        else:
            values[node] = make(node.op, *(a and values[a] for a in node.args), **dict(node.attrs))
    wide = Graph("wide", tuple(values[n] for n in body.inputs), (values[body.outputs[0]],))
    return interpret(wide, [operand.double() for operand in operands])[0]


def check(
    form: Form, tokens: int, gemv: GemvTiles | None, gemms: Sequence[GemmTiles], seed: int = 0
) -> torch.Tensor:
    """The kernel's result, held against float64."""
    node, body = node_of(form), body_of(form)
    problem = problem_of(node)
    assert problem is not None
    source = linear_source(problem, H100, gemv, gemms)
    assert source is not None
    generator = torch.Generator().manual_seed(seed)
    operands, bases = [], []
    for outer, inner in zip(node.operands, body.inputs, strict=True):
        base, layout = located(outer)
        shape = [evaluate(size, {"B": tokens}) for size in base.shape]
        data = torch.randn(shape, generator=generator, dtype=torch.float64)
        if inner.shape == (form.rows, form.k):
            data *= form.k**-0.5  # sums of order 1: float16 has room for their squares
        data = data.to(inner.dtype.torch)
        own = [evaluate(size, {"B": tokens}) for size in inner.shape]
        bases.append(data)
        operands.append(data.as_strided(own, [int(str(s)) for s in layout.strides], layout.offset))
    (found,) = run_interpreted(source, node, bases, {"B": tokens})
    wanted = in_float64(body, operands)
    assert found.shape == wanted.shape and found.dtype is form.dtype.torch
    scale = 1.0 + float(wanted.abs().max())
    assert float((found.double() - wanted).abs().max()) <= ERROR[form.dtype] * scale
    return found


@st.composite
def forms(draw: st.DrawFn) -> Form:
    return Form(
        k=draw(st.sampled_from([1, 7, 16, 40, 64, 100])),
        n=draw(st.sampled_from([1, 3, 8, 20, 33])),
        dtype=draw(st.sampled_from([DType.F32, DType.BF16, DType.F16])),
        norm=draw(st.sampled_from(["none", "weight", "bare"])),
        bias=draw(st.booleans()),
        halves=draw(st.booleans()),
        behind=tuple(draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=3))),
        strided=draw(st.booleans()),
    )


@settings(max_examples=20, deadline=None, phases=PHASES)
@given(form=forms(), block_n=st.sampled_from([1, 2, 8]), block_k=st.sampled_from([16, 32, 128]))
def test_one_token(form: Form, block_n: int, block_k: int) -> None:
    check(form, 1, GemvTiles(block_n, block_k, 1), [SMALL_GEMM])


@settings(max_examples=20, deadline=None, phases=PHASES)
@given(
    form=forms(),
    tokens=st.integers(1, 40),
    block_n=st.sampled_from([2, 16]),
    splits=st.integers(1, 4),
)
def test_several_tokens(form: Form, tokens: int, block_n: int, splits: int) -> None:
    tiles = GemmTiles(16, block_n, 16, 1, 2, splits, ahead=64)
    if not tiles.has_work(form.k):
        tiles = replace(tiles, splits=1)
    check(form, tokens, None, [tiles])


@pytest.mark.quick
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 33])
def test_the_first_tiles_that_hold_all_tokens_are_taken(tokens: int) -> None:
    form = Form(norm="weight", halves=True, behind=("residual",), dtype=DType.BF16)
    gemms = [SMALL_GEMM, replace(SMALL_GEMM, block_m=32, splits=3)]
    check(form, tokens, SMALL_GEMV, gemms)


@pytest.mark.quick
def test_parts_of_a_product_give_the_same_bits_again_and_leave_their_counters_at_zero() -> None:
    form = Form(k=128, behind=("residual",))
    tiles = replace(SMALL_GEMM, splits=4)
    first = check(form, 5, None, [tiles])
    assert torch.equal(first, check(form, 5, None, [tiles]))
    problem = problem_of(node_of(form))
    assert problem is not None
    source = linear_source(problem, H100, None, [tiles])
    assert source is not None
    from tilewright.codegen.triton.interpreted import InterpretedKernel

    kernel = InterpretedKernel.of(source, node_of(form))
    operands = [torch.randn(5, 128), torch.randn(24, 128), torch.randn(5, 24)]
    once = kernel(operands, {"B": 5})[0]
    assert torch.equal(once, kernel(operands, {"B": 5})[0])
    assert [int(counters.abs().sum()) for counters in kernel._counters] == [0]


def test_a_split_without_columns_is_refused() -> None:
    problem = problem_of(node_of(Form(k=16 * 5)))
    assert problem is not None
    tiles = replace(SMALL_GEMM, splits=4)  # 5 tiles of 16 columns: 2, 2, 1 and none
    assert not tiles.has_work(problem.k)
    assert linear_source(problem, H100, None, [tiles]) is None


def test_other_nodes_are_declined() -> None:
    node = node_of(Form())
    layouts = tuple(located(operand)[1] for operand in node.operands)
    body = body_of(Form())
    other = make("fused", *node.operands, body=body, kind="reduction")
    assert emit_linear(other, layouts, H100) is None
    double = Form(dtype=DType.F64)
    assert emit_linear(node_of(double), layouts, H100) is None
    assert emit_linear(node, (None, *layouts[1:]), H100) is None
    assert emit_linear(node, layouts, H100) is not None


def test_an_op_without_a_text_is_declined() -> None:
    x, weight = tensor("x", DType.F32, B, 16), tensor("weight", DType.F32, 8, 16)
    product = make("linear", x, weight, None)
    body = Graph("body", (x, weight), (make("softmax", product, dim=1),))
    node = make("fused", x, weight, body=body, kind="linear")
    assert emit_linear(node, tuple(located(o)[1] for o in node.operands), H100) is None


SHAPES = {  # of Llama-3-8B and 1B: K, N, halves, norm
    "qkv": (4096, 6144, False, "weight"),
    "o": (4096, 4096, False, "none"),
    "gate_up": (4096, 14336, True, "weight"),
    "down": (14336, 4096, False, "none"),
    "gate_up_1b": (2048, 8192, True, "weight"),
    "small": (576, 192, False, "weight"),
}


@pytest.mark.parametrize("arch", ["a100", "l4", "h100", "b200"])
def test_defaults_compile_ahead_of_time_and_do_not_spill(arch: str) -> None:
    target = TARGETS[arch]
    for k, n, halves, norm in (SHAPES["gate_up"], SHAPES["down"], SHAPES["small"]):
        behind = () if halves else ("residual",)
        form = Form(k, n, DType.BF16, norm, halves=halves, behind=behind)
        source = emit_linear(node_of(form), tuple(map(_layout, node_of(form).operands)), target)
        assert source is not None
        found = compile_for(source, target.arch)
        assert all(one.shared <= target.shared_memory_per_block for one in found)
        if arch == "h100":
            assert [one.spills for one in found] == [0] * len(found)


def _layout(node: Node):
    return located(node)[1]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
@pytest.mark.parametrize("target", ["h100", "l4"])
def test_defaults_fit_their_target(name: str, dtype: DType, target: str) -> None:
    k, n, halves, norm = SHAPES[name]
    problem = problem_of(node_of(Form(k, n, dtype, norm, halves=halves)))
    assert problem is not None
    device = TARGETS[target]
    assert default_gemv(problem, device).block_n >= 1
    for block_m in (16, 32, 64, 128):
        tiles = default_gemm(problem, device, block_m)
        assert tiles is not None and tiles.has_work(problem.k)
        assert shared_bytes(problem, tiles) <= device.shared_memory_per_block

"""Decode linears in Triton against their bodies in float64: every prologue and epilogue, any number
of tokens, odd sizes, parts of a product that are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from linear_forms import (
    B,
    Form,
    assert_close,
    body_of,
    forms,
    in_float64,
    node_of,
    operands_of,
    problem_of,
    tensor,
)
from tilewright.codegen.triton.kernels.linear import emit_linear, linear_source
from tilewright.codegen.triton.kernels.linear_tiles import (
    GemmTiles,
    GemvTiles,
    default_gemm,
    default_gemv,
    shared_bytes,
)
from tilewright.codegen.triton.layout import located
from tilewright.ir.build import make
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.targets import TARGETS
from triton_running import compile_for, run_interpreted

H100 = TARGETS["h100"]
# Shrinking interpreted kernels takes minutes, and the first failure says enough.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
SMALL_GEMV, SMALL_GEMM = GemvTiles(2, 32, 1), GemmTiles(16, 16, 16, 2, 2)


def check(
    form: Form, tokens: int, gemv: GemvTiles | None, gemms: Sequence[GemmTiles], seed: int = 0
) -> torch.Tensor:
    """The kernel's result, held against float64."""
    node, body = node_of(form), body_of(form)
    problem = problem_of(node)
    assert problem is not None
    source = linear_source(problem, H100, gemv, gemms)
    assert source is not None
    bases, operands = operands_of(form, tokens, seed)
    (found,) = run_interpreted(source, node, bases, {"B": tokens})
    assert_close(form, found, in_float64(body, operands))
    return found


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


@pytest.mark.parametrize(
    "arch, names",
    [
        pytest.param("a100", ["gate_up"], marks=pytest.mark.nightly),
        pytest.param("l4", ["down"], marks=pytest.mark.nightly),
        ("h100", ["gate_up"]),
        pytest.param("h100", ["down", "small"], marks=pytest.mark.nightly),
        pytest.param("b200", ["small"], marks=pytest.mark.nightly),
    ],
)
def test_defaults_compile_ahead_of_time_and_do_not_spill(arch: str, names: list[str]) -> None:
    target = TARGETS[arch]
    for k, n, halves, norm in (SHAPES[name] for name in names):
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


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("norm", ["weight", "bare"])
def test_what_the_norm_reads_may_be_added_behind_the_product(norm: str, tokens: int) -> None:
    form = Form(k=32, n=32, norm=norm, behind=("x",))
    check(form, tokens, SMALL_GEMV, [SMALL_GEMM])

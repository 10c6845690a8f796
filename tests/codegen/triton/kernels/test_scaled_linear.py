"""Decode products of two operands in codes, in Triton, against float64 over the numbers that the
codes stand for; and what they compile to.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from linear_forms import Form, assert_close
from quant_forms import (
    QuantForm,
    ScaledForm,
    quant_node,
    scaled_forms,
    scaled_node,
    scaled_operands,
)
from tilewright.codegen.triton.kernels.linear_tiles import Cutting, GemmTiles, GemvTiles
from tilewright.codegen.triton.kernels.scaled_linear import (
    emit_invariant_scaled_linear,
    emit_scaled_linear,
    scaled_linear_source,
)
from tilewright.codegen.triton.kernels.scaled_linear_tiles import Scaled
from tilewright.codegen.triton.layout import located
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.targets import TARGETS
from triton_running import SPILLED, compile_for, run_interpreted

H100 = TARGETS["h100"]
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
SMALL_GEMV, SMALL_GEMM = GemvTiles(2, 32, 1), GemmTiles(16, 16, 32, 2, 2)


def scaled_of(form: ScaledForm) -> Scaled:
    node = scaled_node(form)
    found = Scaled.of(node, layouts(node))
    assert found is not None
    return found


def layouts(node: Node):
    return tuple(located(operand)[1] for operand in node.operands)


def check(
    form: ScaledForm, tokens: int, gemv: GemvTiles | None, gemms: list[GemmTiles], seed: int = 0
) -> None:
    """Holds the kernel's result against float64."""
    source = scaled_linear_source(scaled_of(form), H100, gemv, gemms)
    assert source is not None
    bases, wanted = scaled_operands(form, tokens, seed)
    (found,) = run_interpreted(source, scaled_node(form), bases, {"B": tokens})
    assert_close(form.form, found, wanted)


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(form=scaled_forms(), block_n=st.sampled_from([1, 8]), block_k=st.sampled_from([32, 128]))
def test_one_token(form: ScaledForm, block_n: int, block_k: int) -> None:
    check(form, 1, GemvTiles(block_n, block_k, 1), [SMALL_GEMM])


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(
    form=scaled_forms(),
    tokens=st.integers(1, 40),
    block_n=st.sampled_from([16, 32]),
    splits=st.integers(1, 3),
)
def test_several_tokens(form: ScaledForm, tokens: int, block_n: int, splits: int) -> None:
    tiles = GemmTiles(16, block_n, 32, 1, 2, splits, ahead=64)
    if not tiles.has_work(form.form.k):
        tiles = replace(tiles, splits=1)
    check(form, tokens, None, [tiles])


@pytest.mark.quick
@pytest.mark.parametrize("codes", [DType.F8E4M3, DType.I8])
def test_the_first_tiles_that_hold_all_tokens_are_taken(codes: DType) -> None:
    form = ScaledForm(Form(96, 24, DType.BF16, "weight", halves=True), codes)
    gemms = [SMALL_GEMM, replace(SMALL_GEMM, block_m=32, block_k=64, splits=2)]
    for tokens in (1, 2, 17):
        check(form, tokens, SMALL_GEMV, gemms)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("codes", [DType.F8E4M3, DType.I8])
def test_a_row_with_a_nan_is_nan_and_no_other(codes: DType, tokens: int) -> None:
    form = ScaledForm(Form(64, 16, DType.F32), codes)
    source = scaled_linear_source(scaled_of(form), H100, SMALL_GEMV, [SMALL_GEMM])
    assert source is not None
    bases, _ = scaled_operands(form, tokens)
    bases[0][0, 5] = float("nan")
    (found,) = run_interpreted(source, scaled_node(form), bases, {"B": tokens})
    assert found[0].isnan().all() and not found[1:].isnan().any()


def test_a_row_of_zeros_gives_the_bias() -> None:
    form = ScaledForm(Form(64, 16, DType.F32, bias=True))
    source = scaled_linear_source(scaled_of(form), H100, SMALL_GEMV, [SMALL_GEMM])
    assert source is not None
    bases, _ = scaled_operands(form, 3)
    bases[0].zero_()
    (found,) = run_interpreted(source, scaled_node(form), bases, {"B": 3})
    assert torch.equal(found, bases[-1].expand(3, -1))


def emitted(form: ScaledForm, arch: str = "h100", most: int | None = None):
    node = scaled_node(form)
    return emit_scaled_linear(node, layouts(node), TARGETS[arch], Cutting(most))


def test_what_is_taken_and_what_is_declined() -> None:
    plain = quant_node(QuantForm())
    assert emit_scaled_linear(plain, layouts(plain), H100) is None
    node = scaled_node(ScaledForm())
    assert emit_scaled_linear(node, layouts(node), H100) is not None
    assert emit_invariant_scaled_linear(node, layouts(node), H100) is not None
    static = scaled_node(ScaledForm(static=True))
    assert emit_scaled_linear(static, (*layouts(static)[:-1], None), H100) is None
    assert emitted(ScaledForm(group=16)) is None  # an instruction takes 32 columns
    assert emitted(ScaledForm(group=48)) is None
    assert emitted(ScaledForm(), "a100") is None
    assert emitted(ScaledForm(codes=DType.I8), "a100") is not None


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(
            ScaledForm(Form(4096, 14336, DType.BF16, "weight", halves=True)),
            id="fp8",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            ScaledForm(Form(14336, 4096, DType.BF16, behind=("residual",)), DType.I8),
            id="int8",
            marks=pytest.mark.nightly,
        ),
        pytest.param(ScaledForm(Form(4096, 4096, DType.BF16), group=128, rows=128), id="fp8-block"),
    ],
)
def test_defaults_compile_ahead_of_time_and_do_not_spill(form: ScaledForm) -> None:
    source = emitted(form, most=64)
    assert source is not None
    found = compile_for(source, H100.arch)
    assert all(one.shared <= H100.shared_memory_per_block for one in found)
    assert all(one.spills <= SPILLED for one in found)

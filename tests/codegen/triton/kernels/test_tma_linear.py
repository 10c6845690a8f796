"""Linears of many tokens in Triton, against float64; and what they compile to for an H100."""

from __future__ import annotations

from dataclasses import replace

import pytest

from linear_forms import Form, assert_close, body_of, in_float64, node_of, operands_of, problem_of
from tilewright.codegen.triton.kernels.tma_linear import emit_tma_linear, tma_linear_source
from tilewright.codegen.triton.kernels.tma_linear_tiles import (
    TmaTiles,
    default_tma,
    tma_fits,
    tma_shared_bytes,
)
from tilewright.codegen.triton.layout import located
from tilewright.ir.dtypes import DType
from tilewright.targets import TARGETS
from triton_running import compile_for, run_interpreted

H100 = TARGETS["h100"]
TWO = replace(H100, sms=2)  # programs that each have several tiles
SMALL = TmaTiles(32, 16, 32, 2, 4, 2, 2)
GATED = Form(4096, 14336, DType.BF16, "weight", halves=True)
DOWN = Form(14336, 4096, DType.BF16, behind=("residual",))
FORMS = [
    Form(48, 40, DType.BF16, behind=("residual",)),
    Form(64, 24, DType.F16, "weight", bias=True, halves=True),
    Form(72, 24, DType.BF16, "bare", halves=True, behind=("residual", "columns")),
    Form(64, 40, DType.BF16, bias=True, behind=("gelu", "rows"), strided=True),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 77])
def test_every_prologue_and_epilogue(form: Form, tokens: int) -> None:
    node = node_of(form)
    problem = problem_of(node)
    assert problem is not None
    tiles = replace(SMALL, strips=1 + tokens % 2, flat=tokens > 1)
    source = tma_linear_source(problem, TWO, tiles)
    assert source is not None
    bases, operands = operands_of(form, tokens)
    (found,) = run_interpreted(source, node, bases, {"B": tokens})
    assert_close(form, found, in_float64(body_of(form), operands))


def test_each_tile_is_computed_once() -> None:
    # More blocks of tokens than a group has, and a last group that is not full.
    form = Form(16, 40, DType.BF16)
    problem = problem_of(node_of(form))
    assert problem is not None
    source = tma_linear_source(problem, TWO, replace(SMALL, group=3, block_k=16))
    assert source is not None
    bases, operands = operands_of(form, 32 * 7 + 1)
    (found,) = run_interpreted(source, node_of(form), bases, {"B": 32 * 7 + 1})
    assert_close(form, found, in_float64(body_of(form), operands))


def test_what_is_taken_and_what_is_declined() -> None:
    def emitted(form: Form, arch: str = "h100"):
        node = node_of(form)
        return emit_tma_linear(node, tuple(located(o)[1] for o in node.operands), TARGETS[arch])

    assert emitted(GATED) is not None and emitted(DOWN) is not None
    assert emitted(DOWN, "a100") is None  # no descriptors
    assert emitted(replace(DOWN, dtype=DType.F32)) is None
    assert emitted(replace(DOWN, k=4100)) is None  # rows of 8200 bytes
    problem = problem_of(node_of(DOWN))
    assert problem is not None
    tiles = default_tma(problem, H100)
    assert tiles is not None and not tma_fits(problem, replace(tiles, num_stages=9), H100)
    assert tma_linear_source(problem, H100, replace(tiles, block_m=512)) is None
    special = replace(tiles, num_warps=4, flat=False, special=True)
    assert tma_fits(problem, special, H100)
    assert not tma_fits(problem, replace(special, flat=True), H100)
    assert not tma_fits(problem, replace(special, block_m=64, block_n=64), H100)
    assert not tma_fits(problem, replace(tiles, num_warps=4), H100)  # 256 sums a thread


def test_the_default_compiles_without_spilling_into_what_is_said_of_it() -> None:
    problem = problem_of(node_of(GATED))
    assert problem is not None
    tiles = default_tma(problem, H100)
    assert tiles is not None
    source = tma_linear_source(problem, H100, tiles)
    assert source is not None
    normalises, multiplies = compile_for(source, 90)
    assert normalises.spills == multiplies.spills == 0
    assert multiplies.shared <= tma_shared_bytes(problem, tiles)

"""Paged attention over codes in Triton, ragged, against float64 over what the codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_forms import FEATURES, OP, RAGGED, SHAPES, Shape, layouts_of, truth
from paged_forms import ragged_call as call
from paged_forms import ragged_operands as operands_of
from tilewright.codegen.triton.candidates import INVARIANT, KERNELS
from tilewright.codegen.triton.kernels.scaled_attention import (
    emit_invariant_scaled_attention,
    emit_scaled_attention,
    scaled_attention_source,
)
from tilewright.codegen.triton.kernels.scaled_decode import emit_scaled_decode
from tilewright.codegen.triton.kernels.scaled_tiles import (
    prefill_shared_bytes,
    prefill_tiles,
    scaled_problem,
)
from tilewright.ir.dtypes import DType
from tilewright.targets import TARGETS
from triton_running import compile_for, run_interpreted

H100 = TARGETS["h100"]
CODES = st.sampled_from([DType.I8, DType.F8E4M3])


def check(shape: Shape, sequences: Sequence[tuple[int, int]], padding: int = 0, **attrs) -> None:
    """The kernel agrees with the truth."""
    node = call(shape, **attrs)
    source = emit_scaled_attention(node, layouts_of(node), H100)
    assert source is not None
    operands, sizes = operands_of(shape, sequences, padding)
    (found,) = run_interpreted(source, node, operands, sizes)
    relative, absolute = OP.tolerance[shape.dtype]
    wanted = truth(shape, node, operands)
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)


@settings(max_examples=5)
@given(SHAPES, CODES, RAGGED, st.integers(0, 9), FEATURES)
def test_ragged_sequences(shape, codes, sequences, padding, features):
    check(replace(shape, codes=codes), sequences, padding, **features)


@settings(max_examples=3)
@given(SHAPES, CODES, RAGGED, FEATURES, st.sampled_from([DType.BF16, DType.F16]))
def test_half_precision(shape, codes, sequences, features, dtype):
    check(replace(shape, codes=codes, dtype=dtype), sequences, **features)


def test_rows_of_no_sequence_and_queries_without_keys_give_zero():
    shape = Shape(codes=DType.I8, sinks=True)
    node = call(shape)
    source = emit_scaled_attention(node, layouts_of(node), H100)
    operands, sizes = operands_of(shape, [(4, 3), (0, 9)], padding=7)
    operands[5] += 5  # rows before the first sequence, too
    (found,) = run_interpreted(source, node, operands, sizes)
    assert not found[:5].any() and not found[17:].any()
    assert found[5:17].flatten(1).any(1).all()
    operands[4].zero_()
    assert not run_interpreted(source, node, operands, sizes)[0].any()


@pytest.mark.quick
def test_each_candidate_takes_its_own_form():
    node = call(Shape(codes=DType.I8))
    assert emit_scaled_decode(node, layouts_of(node), H100) is None
    assert emit_scaled_attention in KERNELS["scaled_paged_attention"]
    assert INVARIANT["scaled_paged_attention"] == (emit_invariant_scaled_attention,)
    for wrong, target in ((Shape(), "h100"), (Shape(codes=DType.F8E4M3), "a100")):
        node = call(wrong)
        assert emit_scaled_attention(node, layouts_of(node), TARGETS[target]) is None


def test_the_default_compiles_without_spills():
    node = call(Shape(4, 8, 128, 128, 16, True, DType.BF16, codes=DType.F8E4M3))
    problem = scaled_problem(node, layouts_of(node))
    tiles = prefill_tiles(problem, H100)
    (resources,) = compile_for(scaled_attention_source(problem, tiles), H100.arch)
    assert resources.spills == 0
    assert resources.shared <= prefill_shared_bytes(problem, tiles)
    assert prefill_shared_bytes(problem, tiles) <= H100.shared_memory_per_block

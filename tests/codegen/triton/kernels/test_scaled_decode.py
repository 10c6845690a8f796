"""Paged decode attention over codes in Triton against float64 over what the codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_forms import FEATURES, LENGTHS, OP, OUTSIDE, SHAPES, Shape, layouts_of, truth
from paged_forms import decode_call as call
from paged_forms import decode_operands as operands_of
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem
from tilewright.codegen.triton.kernels.paged_decode_tiles import SPACE, Tiles
from tilewright.codegen.triton.kernels.scaled_decode import (
    emit_scaled_decode,
    scaled_decode_source,
)
from tilewright.codegen.triton.kernels.scaled_tiles import (
    decode_fits,
    decode_shared_bytes,
    decode_tiles,
    scaled_problem,
)
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.targets import TARGETS
from triton_running import run_interpreted

H100 = TARGETS["h100"]
TILES = Tiles(block_n=16, num_warps=1, num_stages=1, min_keys=16)
CODES = st.sampled_from([DType.I8, DType.F8E4M3])
CUTS = st.builds(
    Tiles,
    block_n=st.sampled_from([16, 32, 64]),
    num_warps=st.just(1),
    num_stages=st.just(1),
    min_keys=st.sampled_from([16, 64]),
    by_page=st.booleans(),
    fixed_split_keys=st.sampled_from([None, None, 32]),
)


def problem_of(node: Node) -> Problem:
    problem = scaled_problem(node, layouts_of(node))
    assert problem is not None
    return problem


def run(
    source: KernelSource, node: Node, operands: Sequence[torch.Tensor | None], sizes: dict[str, int]
) -> torch.Tensor:
    (found,) = run_interpreted(source, node, operands, sizes)
    return found


def check(
    shape: Shape, lengths: Sequence[int], tiles: Tiles | None = TILES, splits: int = 3, **attrs
) -> None:
    """The kernel agrees with the truth; with ``tiles`` None, the default does."""
    node = call(shape, **attrs)
    if tiles is None:
        source = emit_scaled_decode(node, layouts_of(node), H100.override(sms=4))
    else:
        given = None if tiles.fixed_split_keys else splits
        source = scaled_decode_source(problem_of(node), tiles, H100, given)
    assert source is not None
    operands, sizes = operands_of(shape, lengths)
    found = run(source, node, operands, sizes).double()
    relative, absolute = OP.tolerance[shape.dtype]
    torch.testing.assert_close(found, truth(shape, node, operands), rtol=relative, atol=absolute)


@settings(max_examples=4)
@given(SHAPES, CODES, LENGTHS, CUTS, st.integers(1, 32), FEATURES)
def test_any_cut_gives_the_truth(shape, codes, lengths, tiles, splits, features):
    check(replace(shape, codes=codes), lengths, tiles, splits, **features)


@settings(max_examples=3)
@given(SHAPES, CODES, LENGTHS, FEATURES, st.sampled_from([DType.BF16, DType.F16]))
def test_half_precision(shape, codes, lengths, features, dtype):
    check(replace(shape, codes=codes, dtype=dtype), lengths, **features)


@settings(max_examples=2)
@given(SHAPES, CODES, LENGTHS, FEATURES)
def test_defaults_give_the_truth(shape, codes, lengths, features):
    check(replace(shape, codes=codes), lengths, None, **features)


@pytest.mark.parametrize("codes", [DType.I8, DType.F8E4M3])
def test_small_values_in_float16_keep_their_digits(codes):
    """Weights times scales of 1e-5 are below what float16 has: they are scaled among themselves."""
    shape = Shape(4, 1, 16, 16, 8, True, DType.F16, codes=codes)
    node = call(shape)
    operands, sizes = operands_of(shape, [41])
    operands[9] *= 1e-5
    found = run(scaled_decode_source(problem_of(node), TILES, H100, 2), node, operands, sizes)
    wanted = truth(shape, node, operands)
    assert (found.double() - wanted).abs().max() < 4e-3 * wanted.abs().max() + 2**-24


def test_sequences_of_length_0_give_zero():
    shape = Shape(codes=DType.I8, sinks=True)
    node = call(shape)
    operands, sizes = operands_of(shape, [0, 40, 0])
    for splits in (1, 3):
        source = scaled_decode_source(problem_of(node), TILES, H100, splits)
        found = run(source, node, operands, sizes)
        assert not found[0].any() and not found[2].any() and found[1].any(-1).all()


def test_keys_before_the_window_are_not_read():
    shape = Shape(page=2, codes=DType.F8E4M3)
    node = call(shape, window=5)
    operands, sizes = operands_of(shape, [71])
    wanted = truth(shape, node, operands)
    pages = operands[3][0, : (71 - 5) // 2]
    for scales in operands[8:10]:
        scales[pages.long()] = torch.nan
    pages.fill_(OUTSIDE)
    found = run(scaled_decode_source(problem_of(node), TILES, H100, 3), node, operands, sizes)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch_by_fixed_splits():
    shape = Shape(dtype=DType.BF16, page=8, paged=True, codes=DType.I8)
    node = call(shape)
    source = scaled_decode_source(problem_of(node), replace(TILES, fixed_split_keys=32), H100)
    operands, sizes = operands_of(shape, [75, 3])
    together = run(source, node, operands, sizes)
    alone = [operands[0][:1], *operands[1:3], operands[3][:1].contiguous(), operands[4][:1]]
    found = run(source, node, [*alone, *operands[5:]], {**sizes, "B": 1})
    assert torch.equal(found[0], together[0])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("shape", "target"),
    [
        (Shape(codes=DType.I8, dtype=DType.F64), "h100"),
        (Shape(codes=DType.I8, head_dim=4096), "h100"),
        (Shape(codes=DType.F8E4M3), "a100"),
        (Shape(), "h100"),
    ],
)
def test_what_it_does_not_take(shape, target):
    node = call(shape)
    assert emit_scaled_decode(node, layouts_of(node), TARGETS[target]) is None


@pytest.mark.quick
def test_an_a100_has_int8():
    node = call(Shape(codes=DType.I8))
    assert emit_scaled_decode(node, layouts_of(node), TARGETS["a100"]) is not None


@given(SHAPES, CODES, st.sampled_from(["h100", "l4", "b200"]), st.sampled_from([16, 32]))
def test_defaults_lie_in_the_search_space_and_fit(shape, codes, target, bits):
    dtype = DType.BF16 if bits == 16 else DType.F32
    problem = problem_of(call(replace(shape, codes=codes, dtype=dtype)))
    tiles = decode_tiles(problem, TARGETS[target])
    assert decode_fits(problem, tiles, TARGETS[target])
    assert all(getattr(tiles, name) in allowed for name, allowed in SPACE.items())


@pytest.mark.parametrize(("target", "codes"), [("h100", DType.F8E4M3), ("a100", DType.I8)])
def test_defaults_compile_without_spills(target, codes):
    device = TARGETS[target]
    problem = problem_of(call(Shape(4, 8, 128, 128, 16, True, DType.BF16, codes=codes)))
    tiles = decode_tiles(problem, device)
    (package,) = compile_sources([scaled_decode_source(problem, tiles, device)], device.arch)
    decode, merge = package.resources
    assert decode.spills == merge.spills == 0
    bound = decode_shared_bytes(problem, tiles)
    assert decode.shared <= bound <= device.shared_memory_per_block

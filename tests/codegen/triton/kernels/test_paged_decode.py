"""Paged decode attention in Triton against the op's reference, run in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paged_forms
from paged_forms import FEATURES, LENGTHS, OP, OUTSIDE, SHAPES, layouts_of, truth
from paged_forms import decode_call as call
from paged_forms import decode_operands as operands_of
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.candidates import KERNELS
from tilewright.codegen.triton.invocation import plan_call
from tilewright.codegen.triton.kernels.paged_attention import emit_paged_attention
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem
from tilewright.codegen.triton.kernels.paged_decode import emit_paged_decode, paged_decode_source
from tilewright.codegen.triton.kernels.paged_decode_tiles import (
    MAX_SPLITS,
    SPACE,
    Tiles,
    default_tiles,
    fits,
    num_splits,
    shared_bytes,
)
from tilewright.codegen.triton.source import KernelSource, Scalar
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import evaluate, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS, Target
from triton_running import run_interpreted

H100 = TARGETS["h100"]
TILES = Tiles(block_n=16, num_warps=1, num_stages=1, min_keys=16)
Shape = partial(paged_forms.Shape, paged=True)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and workspaces are NaN before a kernel writes them."""
    empty = torch.empty

    def poisoned(*size, **options) -> torch.Tensor:
        memory = empty(*size, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poisoned)


def problem_of(node: Node) -> Problem:
    problem = Problem.of(node, layouts_of(node))
    assert problem is not None
    return problem


def run(
    source: KernelSource, node: Node, operands: Sequence[torch.Tensor | None], sizes: dict[str, int]
) -> torch.Tensor:
    (found,) = run_interpreted(source, node, operands, sizes)
    return found


def check(
    shape: paged_forms.Shape,
    lengths: Sequence[int],
    tiles: Tiles | None = TILES,
    splits: int = 3,
    **attrs,
) -> None:
    """The kernel agrees with the reference; with ``tiles`` None, the default does."""
    node = call(shape, **attrs)
    if tiles is None:
        source = emit_paged_decode(node, layouts_of(node), H100.override(sms=4))
    else:
        given = None if tiles.fixed_split_keys else splits
        source = paged_decode_source(problem_of(node), tiles, H100, given)
    assert source is not None
    operands, sizes = operands_of(shape, lengths)
    found = run(source, node, operands, sizes).double()
    relative, absolute = OP.tolerance[shape.dtype]
    wanted = truth(shape, node, operands)
    torch.testing.assert_close(found, wanted, rtol=relative, atol=absolute)


CUTS = st.builds(
    Tiles,
    block_n=st.sampled_from([16, 32, 64]),
    num_warps=st.just(1),
    num_stages=st.just(1),
    min_keys=st.sampled_from([16, 64]),
    by_page=st.booleans(),
    evict_first=st.booleans(),
    fixed_split_keys=st.sampled_from([None, None, 32]),
)


@settings(max_examples=7)
@given(SHAPES, LENGTHS, CUTS, st.integers(1, 32), FEATURES)
def test_any_cut_gives_the_reference(shape, lengths, tiles, splits, features):
    check(shape, lengths, tiles, splits, **features)


@settings(max_examples=4)
@given(SHAPES, LENGTHS, CUTS, FEATURES, st.sampled_from([DType.BF16, DType.F16]))
def test_half_precision(shape, lengths, tiles, features, dtype):
    check(replace(shape, dtype=dtype), lengths, tiles, **features)


@settings(max_examples=4)
@given(SHAPES, LENGTHS, FEATURES, st.sampled_from([DType.F32, DType.BF16]))
def test_defaults_give_the_reference(shape, lengths, features, dtype):
    check(replace(shape, dtype=dtype), lengths, None, **features)


@pytest.mark.quick
def test_lengths_on_and_beside_edges_of_pages_and_splits():
    check(Shape(page=8, kv_heads=1, sinks=True), [0, 1, 16, 17, 32, 49], splits=2)


@pytest.mark.parametrize("head_dim, value_dim", [(128, 128), (192, 128), (256, 256), (33, 1)])
def test_head_dims(head_dim, value_dim):
    shape = Shape(head_dim=head_dim, value_dim=value_dim, kv_heads=1)
    check(shape, [41, 3])
    check(replace(shape, dtype=DType.BF16), [41, 3], None)


def test_heads_of_a_wide_group_are_spread_over_tiles():
    check(Shape(group=37, kv_heads=1, sinks=True), [18])
    check(Shape(group=71, kv_heads=1, dtype=DType.BF16), [18], splits=1)


def test_more_splits_than_one_load_of_the_merge():
    check(Shape(kv_heads=1, group=1, value_dim=512), [16 * 18 + 1], splits=32)


def test_sequences_of_length_0_give_zero():
    shape = Shape(sinks=True)
    node = call(shape)
    operands, sizes = operands_of(shape, [0, 40, 0])
    for splits in (1, 3):
        source = paged_decode_source(problem_of(node), TILES, H100, splits)
        found = run(source, node, operands, sizes)
        assert not found[0].any() and not found[2].any() and found[1].all()


def test_keys_before_the_window_are_not_read():
    shape = Shape(page=2)
    node = call(shape, window=5)
    operands, sizes = operands_of(shape, [71, 92])
    wanted = truth(shape, node, operands)
    for b, length in enumerate((71, 92)):
        freed = (length - 5) // 2  # pages that hold no key of the window
        for cache in operands[1:3]:
            cache[operands[3][b, :freed].long()] = torch.nan
        operands[3][b, :freed] = OUTSIDE
    for by_page in (False, True):
        tiles = replace(TILES, by_page=by_page)
        found = run(paged_decode_source(problem_of(node), tiles, H100, 3), node, operands, sizes)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("page", [4, 16, 32])
def test_page_ids_outside_the_cache_are_not_followed(page):
    # Within a sequence's length they are the caller's error: anything but a wild read will do.
    shape = Shape(page=page)
    node = call(shape)
    operands, sizes = operands_of(shape, [2 * page + 1])
    for cache in operands[1:3]:
        cache.nan_to_num_(1.0)
    operands[3][0, :2] = torch.tensor([OUTSIDE, -OUTSIDE])
    source = paged_decode_source(problem_of(node), TILES, H100, 2)
    assert run(source, node, operands, sizes).isfinite().all()


def test_lengths_beyond_the_table_read_what_it_has():
    shape = Shape()
    node = call(shape)
    operands, sizes = operands_of(shape, [16, 16], spare=0)
    operands[4] += 1000
    source = paged_decode_source(problem_of(node), TILES, H100, 2)
    assert run(source, node, operands, sizes).isfinite().all()


def test_nan_of_one_row_stays_there():
    shape = Shape()
    node = call(shape)
    operands, sizes = operands_of(shape, [41, 21])
    operands[0][1, 3, 0] = torch.nan
    found = run(paged_decode_source(problem_of(node), TILES, H100, 2), node, operands, sizes)
    assert found.isnan().any(-1).nonzero().tolist() == [[1, 3]]


def test_fixed_splits_give_a_sequence_the_same_bits_alone_and_in_a_batch():
    shape = Shape(dtype=DType.BF16, page=8)
    node = call(shape)
    tiles = replace(TILES, fixed_split_keys=32)
    source = paged_decode_source(problem_of(node), tiles, H100)
    operands, sizes = operands_of(shape, [75, 3, 100], spare=3)
    together = run(source, node, operands, sizes)
    for b, length in enumerate([75, 3, 100]):
        width = -(-length // shape.page)
        alone = [operands[0][b : b + 1], *operands[1:3], operands[3][b : b + 1, :width]]
        alone += [operands[4][b : b + 1], None, None, None]
        alone[3] = alone[3].contiguous()
        found = run(source, node, alone, {**sizes, "B": 1, "M": width})
        assert torch.equal(found[0], together[b])


def test_splits_by_load_do_not_promise_that():
    # The control of the test above: by default a batch changes how a sequence is cut.
    problem = problem_of(call(Shape()))
    splits = num_splits(problem, TILES, H100)
    assert evaluate(splits, {"B": 1, "M": 99, "P": 4}) != evaluate(
        splits, {"B": 64, "M": 99, "P": 4}
    )
    fixed = num_splits(problem, replace(TILES, fixed_split_keys=32), H100)
    assert evaluate(fixed, {"B": 1, "M": 99, "P": 4}) == 13


def test_one_split_writes_the_result_itself():
    node = call(Shape())
    problem = problem_of(node)
    (variant,) = paged_decode_source(problem, TILES, H100, 1).variants
    assert [launch.function for launch in variant.launches] == ["decode"]
    assert variant.workspaces == ()
    source = paged_decode_source(problem, TILES, H100)
    for count, launches in ((1, 2), (1000, 1)):
        plan = plan_call(source, node.types, {"B": count, "M": 9, "N": 9, "P": 4})
        assert len(plan.launches) == launches


@given(st.integers(1, 600), st.integers(1, 40), st.integers(1, 999))
def test_splits_fill_the_target_and_have_keys(num_seqs, kv_heads, width):
    problem = problem_of(call(Shape(kv_heads=kv_heads)))
    tiles = Tiles(64, 4, 3, waves=3, min_keys=128)
    sizes = {"B": num_seqs, "M": width}
    splits = evaluate(num_splits(problem, tiles, H100), sizes)
    assert 1 <= splits <= MAX_SPLITS
    assert splits == 1 or splits * num_seqs * kv_heads <= 3 * 132
    assert (splits - 1) * 128 < width * 4


def test_sizes_that_are_known_stand_in_the_text():
    static = {"B": 3, "M": 4, "N": 11, "P": 4}
    node = call(Shape(), static)
    source = paged_decode_source(problem_of(node), TILES, H100)
    (variant,) = source.variants
    assert variant.guard == () and "page_size=4," in source.text
    assert not any(isinstance(a, Scalar) for launch in variant.launches for a in launch.arguments)
    operands, sizes = operands_of(Shape(), [10] * 3)
    assert sizes == static
    found = run(source, node, operands, sizes).double()
    torch.testing.assert_close(found, truth(Shape(), node, operands), rtol=2e-5, atol=2e-5)


@pytest.mark.quick
def test_each_candidate_takes_its_own_form():
    node = call(Shape())
    assert emit_paged_attention(node, layouts_of(node), H100) is None
    assert emit_paged_decode(node, layouts_of(node), H100) is not None
    assert emit_paged_decode in KERNELS["paged_attention"]
    starts = input_node("starts", TensorType(DType.I32, (symbol("B") + 1,)))
    general = make("paged_attention", *node.args[:5], starts, **dict(node.attrs))
    assert emit_paged_decode(general, layouts_of(general), H100) is None
    assert emit_paged_attention(general, layouts_of(general), H100) is not None


@pytest.mark.parametrize(
    "shape, sizes, attrs",
    [
        (Shape(dtype=DType.F64), {}, {}),
        (Shape(head_dim=4096), {}, {}),
        (Shape(kv_heads=symbol("G")), {}, {}),
        (Shape(), {}, {"softcap": 0.0}),
        (Shape(), {}, {"scale": float("inf")}),
    ],
)
def test_what_it_does_not_take(shape, sizes, attrs):
    node = call(shape, sizes, **attrs)
    assert emit_paged_decode(node, layouts_of(node), H100) is None


@pytest.mark.parametrize("operand", range(1, 5))
def test_views_but_of_q_are_not_taken(operand):
    node = call(Shape())
    layouts = list(layouts_of(node))
    layouts[operand] = replace(layouts[operand], offset=16)
    assert emit_paged_decode(node, tuple(layouts), H100) is None


def test_programmatic_launch_is_for_targets_that_have_it():
    node = call(Shape())
    for name, early in (("h100", True), ("a100", False), ("b200", True)):
        source = emit_paged_decode(node, layouts_of(node), TARGETS[name])
        assert [launch.pdl for launch in source.variants[0].launches] == [early, early]


# Shared memory of a block in KiB: CUDA C++ Programming Guide, technical specifications.
LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def device(arch: int) -> Target:
    limit = LIMITS[arch] << 10
    return replace(H100, arch=arch, shared_memory_per_block=limit)


@given(SHAPES, st.sampled_from(sorted(LIMITS)), st.sampled_from([DType.F32, DType.BF16]))
def test_defaults_lie_in_the_search_space_and_fit(shape, arch, dtype):
    problem = problem_of(call(replace(shape, dtype=dtype)))
    tiles = default_tiles(problem, device(arch))
    assert fits(problem, tiles, device(arch))
    assert all(getattr(tiles, name) in allowed for name, allowed in SPACE.items())


@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=() if a == 90 else pytest.mark.nightly) for a in (80, 86, 89, 90, 100)],
)
def test_defaults_compile_without_spills(arch):
    shapes = [Shape(4, 8, width, width, 16, dtype=DType.BF16) for width in (64, 128)]
    problems = [problem_of(call(shape)) for shape in shapes]
    tiles = [default_tiles(problem, device(arch)) for problem in problems]
    pairs = list(zip(problems, tiles, strict=True))
    packages = compile_sources([paged_decode_source(p, t, device(arch)) for p, t in pairs], arch)
    for (problem, own), package in zip(pairs, packages, strict=True):
        decode, merge = package.resources
        assert decode.spills == merge.spills == 0
        assert decode.shared <= shared_bytes(problem, own) <= LIMITS[arch] << 10


@pytest.mark.nightly
def test_what_the_h100_may_choose_compiles_without_spills():
    shape = Shape(4, 8, 128, 128, 16, dtype=DType.BF16)
    rich = Shape(3, 2, 64, 80, 48, sinks=True, alibi=True, strided=True)
    chosen = [
        (shape, Tiles(64, 4, 4, prefetch=2, evict_first=True)),
        (shape, Tiles(32, 2, 4, by_page=False)),
        (replace(shape, paged=False), Tiles(64, 4, 3, fixed_split_keys=512)),
        (replace(shape, page=64), Tiles(64, 4, 3, prefetch=1)),
        (rich, Tiles(16, 4, 2, prefetch=1)),
    ]
    problems = [problem_of(call(s, window=90, softcap=20.0)) for s, _ in chosen]
    tiles = [own for _, own in chosen]
    sources = [paged_decode_source(p, t, H100) for p, t in zip(problems, tiles, strict=True)]
    for problem, own, package in zip(problems, tiles, compile_sources(sources, 90), strict=True):
        decode, merge = package.resources
        assert decode.spills == merge.spills == 0
        assert decode.shared <= shared_bytes(problem, own)

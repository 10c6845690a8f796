"""Paged attention in Triton against the op's reference, run in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_forms import FEATURES, OP, OUTSIDE, RAGGED, SHAPES, Shape, layouts_of, truth
from paged_forms import ragged_call as call
from paged_forms import ragged_operands as operands_of
from tilewright.codegen.triton.invocation import plan_call
from tilewright.codegen.triton.kernels.paged_attention import emit_paged_attention
from tilewright.codegen.triton.kernels.paged_attention_tiles import (
    DECODE,
    PREFILL,
    SPACE,
    Problem,
    default_tiles,
    num_splits,
)
from tilewright.codegen.triton.source import KernelSource, Scalar
from tilewright.ir.dims import evaluate, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.targets import TARGETS, Target
from triton_running import compile_for, run_interpreted

SMALL = TARGETS["h100"].override(sms=4)  # fewer splits: the interpreter takes a program at a time


def run(
    source: KernelSource, node: Node, operands: Sequence[torch.Tensor | None], sizes: dict[str, int]
) -> torch.Tensor:
    (found,) = run_interpreted(source, node, operands, sizes)
    return found


def emitted(node: Node, target: Target = SMALL) -> KernelSource:
    source = emit_paged_attention(node, layouts_of(node), target)
    assert source is not None
    return source


def only(source: KernelSource, variant: int) -> KernelSource:
    """The source with one of its variants, whatever its guard."""
    return replace(source, variants=(replace(source.variants[variant], guard=()),))


def check(
    shape: Shape,
    sequences: Sequence[tuple[int, int]],
    padding: int = 0,
    variants: Sequence[int] = (),
    target: Target = SMALL,
    **attrs,
) -> None:
    """The kernel agrees with the reference, whichever of the ``variants`` runs."""
    node = call(shape, **attrs)
    source = emitted(node, target)
    operands, sizes = operands_of(shape, sequences, padding)
    wanted = truth(shape, node, operands)
    relative, absolute = OP.tolerance[shape.dtype]
    for chosen in [only(source, variant) for variant in variants] or [source]:
        found = run(chosen, node, operands, sizes).double()
        torch.testing.assert_close(found, wanted, rtol=relative, atol=absolute)


STEPS = st.lists(
    st.tuples(st.sampled_from([0, 1, 30, 135]), st.integers(0, 1)), min_size=1, max_size=4
)


@settings(max_examples=10)
@given(SHAPES, RAGGED, st.integers(0, 9), FEATURES)
def test_ragged_sequences(shape, sequences, padding, features):
    check(shape, sequences, padding, **features)


@settings(max_examples=7)
@given(SHAPES, STEPS, st.integers(0, 3), FEATURES)
def test_both_variants_take_a_decode_step(shape, sequences, padding, features):
    check(shape, sequences, padding, variants=(0, -1), **features)


@settings(max_examples=5)
@given(SHAPES, RAGGED, FEATURES, st.sampled_from([DType.BF16, DType.F16]))
def test_half_precision(shape, sequences, features, dtype):
    check(replace(shape, dtype=dtype), sequences, variants=(0, -1), **features)


@pytest.mark.parametrize("head_dim, value_dim", [(128, 128), (192, 128), (256, 256), (33, 1)])
def test_head_dims(head_dim, value_dim):
    shape = Shape(head_dim=head_dim, value_dim=value_dim, kv_heads=1)
    check(shape, [(40, 1), (0, 3)], variants=(0, -1))


@pytest.mark.parametrize("page", [16, 12])
@pytest.mark.parametrize("attrs", [{}, {"window": 100}, {"window": 33}, {"causal": False}])
def test_tiles_that_every_row_sees_whole(page, attrs):
    shape = Shape(page=page, group=2, kv_heads=1, head_dim=24)
    check(shape, [(150, 40), (0, 70), (64, 1)], padding=3, **attrs)


def test_heads_of_a_wide_group_are_spread_over_tiles():
    shape = Shape(group=71, kv_heads=1, sinks=True)
    check(shape, [(40, 1), (0, 3)])
    check(replace(shape, dtype=DType.BF16), [(40, 1), (0, 3)])


def test_more_sequences_than_one_load_of_their_starts():
    check(Shape(group=1, kv_heads=1), [(b % 3, int(b > 110)) for b in range(131)])


def test_one_split_writes_the_result_itself():
    sequences, node = [(40, 1), (3, 1), (0, 1)], call(Shape(sinks=True))
    crowded = TARGETS["h100"].override(sms=1)
    _, sizes = operands_of(Shape(), sequences)
    for target, launches in ((crowded, 1), (TARGETS["h100"], 2)):
        plan = plan_call(emitted(node, target), node.types, sizes)
        assert len(plan.launches) == launches
    check(Shape(sinks=True), sequences, target=crowded)


def test_rows_of_no_sequence_give_zero():
    shape = Shape(sinks=True)
    node = call(shape)
    operands, sizes = operands_of(shape, [(4, 3), (0, 9)], padding=7)
    operands[5] += 5  # rows before the first sequence, too
    for variant in (0, -1):
        found = run(only(emitted(node), variant), node, operands, sizes)
        assert not found[:5].any() and not found[17:].any()
        wanted = truth(shape, node, operands)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


def test_queries_without_keys_give_zero():
    # A captured step of idle sequences; the reference has no maximum of no scores.
    shape = Shape(sinks=True)
    node = call(shape)
    operands, sizes = operands_of(shape, [(0, 1), (0, 1)])
    operands[4].zero_()
    for variant in (0, -1):
        assert not run(only(emitted(node), variant), node, operands, sizes).any()


def test_keys_before_the_window_are_not_read():
    shape = Shape(page=2)
    node = call(shape, window=5)
    operands, sizes = operands_of(shape, [(70, 1), (90, 2)])
    wanted = truth(shape, node, operands)
    for b, before in enumerate((70, 90)):
        freed = (before + 1 - 5) // 2  # pages that hold no key of any window
        for cache in operands[1:3]:
            cache[operands[3][b, :freed].long()] = torch.nan
    for variant in (0, -1):
        found = run(only(emitted(node), variant), node, operands, sizes)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


def test_page_ids_outside_the_cache_are_not_followed():
    # Within a sequence's length they are the caller's error: anything but a wild read will do.
    shape = Shape()
    node = call(shape)
    operands, sizes = operands_of(shape, [(9, 1)])
    for cache in operands[1:3]:
        cache.nan_to_num_(1.0)
    operands[3][0, :2] = torch.tensor([OUTSIDE, -OUTSIDE])
    for variant in (0, -1):
        assert run(only(emitted(node), variant), node, operands, sizes).isfinite().all()


def test_nan_of_one_row_stays_there():
    shape = Shape()
    node = call(shape)
    operands, sizes = operands_of(shape, [(40, 1), (20, 1)])
    operands[0][1, 3, 0] = torch.nan
    for variant in (0, -1):
        found = run(only(emitted(node), variant), node, operands, sizes)
        assert found.isnan().any(-1).nonzero().tolist() == [[1, 3]]


def test_sizes_that_are_known_stand_in_the_text():
    static = {"T": 3, "B": 3, "M": 4, "N": 11, "P": 4}
    source = emitted(call(Shape(), static))
    (variant,) = source.variants  # T <= B always
    assert variant.guard == () and "page_size=4," in source.text
    assert not any(isinstance(a, Scalar) for launch in variant.launches for a in launch.arguments)
    node = call(Shape(), static)
    operands, sizes = operands_of(Shape(), [(9, 1)] * 3)
    assert sizes == static
    found = run(source, node, operands, sizes).double()
    torch.testing.assert_close(found, truth(Shape(), node, operands), rtol=2e-5, atol=2e-5)


def test_a_static_prefill_has_no_decode_variant():
    usual, other = emitted(call(Shape(), {"T": 4, "B": 3})).variants
    assert [launch.function for launch in usual.launches] == ["prefill"]
    assert [launch.function for launch in other.launches] == ["prefill_any"]


def test_decode_is_taken_up_to_one_token_a_sequence():
    source = emitted(call(Shape()))
    (guard,) = source.variants[0].guard
    assert evaluate(guard, {"T": 8, "B": 8}) == 0 and evaluate(guard, {"T": 9, "B": 8}) < 0
    assert source.variants[-1].guard == ()


@given(st.integers(1, 600), st.integers(1, 40))
def test_splits_fill_the_target(num_seqs, kv_heads):
    node = call(Shape(kv_heads=kv_heads))
    problem = Problem.of(node, layouts_of(node))
    splits = evaluate(num_splits(problem, TARGETS["h100"]), {"B": num_seqs})
    assert 1 <= splits <= 32
    assert splits in (1, 32) or splits * num_seqs * kv_heads <= 2 * 132


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
    assert emit_paged_attention(node, layouts_of(node), SMALL) is None


@pytest.mark.parametrize("operand", range(1, 6))
def test_views_but_of_q_are_not_taken(operand):
    node = call(Shape())
    layouts = list(layouts_of(node))
    layouts[operand] = replace(layouts[operand], offset=16)
    assert emit_paged_attention(node, tuple(layouts), SMALL) is None


# Shared memory of a block in KiB: CUDA C++ Programming Guide, technical specifications.
LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@given(SHAPES, st.sampled_from(sorted(LIMITS)), st.sampled_from([DType.F32, DType.BF16]))
def test_defaults_lie_in_the_search_space(shape, arch, dtype):
    node = call(replace(shape, dtype=dtype))
    problem = Problem.of(node, layouts_of(node))
    for table in (DECODE, PREFILL):
        tiles = default_tiles(problem, device(arch), table)
        assert all(getattr(tiles, name) in allowed for name, allowed in SPACE.items())


def device(arch: int) -> Target:
    limit = LIMITS[arch] << 10
    return replace(TARGETS["h100"], arch=arch, shared_memory_per_block=limit)


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=() if a == 90 else pytest.mark.nightly) for a in sorted(LIMITS)]
)
def test_defaults_compile_without_spills(arch):
    node = call(Shape(head_dim=128, value_dim=128, kv_heads=8, dtype=DType.BF16), {"P": 16})
    compiled = compile_for(emitted(node, device(arch)), arch)
    # Decode, merge, and prefill: on Hopper in as many cuts as there are kinds of steps, less one.
    assert len(compiled) == (5 if arch == 90 else 3)
    for resources in compiled:
        assert resources.spills == 0 and resources.shared <= LIMITS[arch] << 10


@pytest.mark.nightly
def test_all_features_in_float32_compile_without_spills():
    shape = Shape(head_dim=64, value_dim=64, group=3, sinks=True, alibi=True, strided=True)
    source = emitted(call(shape, window=9, softcap=20.0), TARGETS["h100"])
    assert all(resources.spills == 0 for resources in compile_for(source, 90))

"""Products of many tokens in Triton against their bodies in float64; what they compile to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from linear_forms import (
    Form,
    assert_close,
    body_of,
    in_float64,
    node_of,
    operands_of,
    problem_of,
)
from tilewright.codegen.triton.interpreted import InterpretedKernel
from tilewright.codegen.triton.kernels.linear_tiles import Problem
from tilewright.codegen.triton.kernels.wide_linear import wide_source
from tilewright.codegen.triton.kernels.wide_linear_tiles import (
    WideTiles,
    default_wide,
    takes_tiles,
    takes_wide,
    wide_shared_bytes,
)
from tilewright.ir.dtypes import DType
from tilewright.targets import TARGETS
from triton_running import compile_for

H100 = TARGETS["h100"]
PLAIN = Form(k=48, n=24, dtype=DType.BF16)
GATED = replace(PLAIN, halves=True)
SMALL = WideTiles(16, 16, 16, 2, 2, 2)
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


def taken(form: Form) -> Problem:
    problem = problem_of(node_of(form))
    assert problem is not None and takes_wide(problem, H100)
    return problem


def check(form: Form, tokens: int, tiles: WideTiles, programs: int) -> None:
    """The kernel gives the body's numbers, twice, and leaves counters at 0."""
    node = node_of(form)
    source = wide_source(taken(form), H100, tiles, programs)
    bases, operands = operands_of(form, tokens)
    kernel = InterpretedKernel.of(source, node)
    (found,) = kernel(bases, {"B": tokens})
    assert_close(form, found, in_float64(body_of(form), operands))
    assert not any(int(counter.count_nonzero()) for counter in kernel._counters)


@settings(max_examples=10, deadline=None, phases=PHASES)
@given(
    form=st.builds(
        Form,
        k=st.sampled_from([16, 40, 104]),
        n=st.sampled_from([8, 24, 40]),
        dtype=st.sampled_from([DType.F16, DType.BF16]),
        norm=st.sampled_from(["none", "none", "weight"]),
        bias=st.booleans(),
        halves=st.booleans(),
        behind=st.sampled_from([(), ("residual",), ("gelu",), ("scaled", "rows"), ("columns",)]),
        strided=st.booleans(),
    ),
    tokens=st.integers(1, 70),
    programs=st.integers(1, 11),
    group=st.integers(1, 3),
    shared=st.booleans(),
    strips=st.integers(1, 2),
)
def test_it_is_the_body_in_float64(form, tokens, programs, group, shared, strips) -> None:
    strips = 1 if form.halves else strips
    check(form, tokens, replace(SMALL, group=group, shared=shared, strips=strips), programs)


@pytest.mark.parametrize(
    ("tokens", "programs"),
    [
        (16, 1),  # one tile, not shared
        (16, 7),  # more programs than steps
        (48, 4),  # 3 tiles of 6 steps: parts of one, two and three programs
        (80, 4),  # a round of whole tiles would leave one: two rounds, less than full, are shared
        (144, 4),  # whole rounds, and then shared ones
        (128, 4),  # rounds that are full
    ],
)
def test_steps_are_shared_by_all_programs_and_each_is_done_once(tokens, programs) -> None:
    check(replace(PLAIN, k=96, n=16), tokens, replace(SMALL, shared=True), programs)


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": DType.F32},
        {"k": 44},  # rows of the weight that are not 16 bytes apart
        {"n": 20},
    ],
)
def test_other_products_are_declined(changed) -> None:
    problem = problem_of(node_of(replace(PLAIN, **changed)))
    assert problem is not None and not takes_wide(problem, H100)


def test_rows_that_begin_elsewhere_than_descriptors_can_are_declined() -> None:
    problem = taken(replace(PLAIN, strided=True))
    assert not takes_wide(replace(problem, x=replace(problem.x, offset=4)), H100)
    assert not takes_wide(replace(problem, x=replace(problem.x, row=52)), H100)


def test_targets_where_it_was_not_measured_are_declined() -> None:
    problem = taken(GATED)
    assert not any(takes_wide(problem, TARGETS[name]) for name in ("a100", "b200", "cpu"))


def test_cuts_that_no_block_holds_are_declined() -> None:
    plain, gated = taken(replace(PLAIN, k=4096, n=4096)), taken(replace(GATED, k=4096, n=4096))
    residual = taken(replace(PLAIN, k=4096, n=4096, behind=("residual",)))
    for problem in (plain, gated, residual):
        assert takes_tiles(problem, default_wide(problem), H100)
    wide = WideTiles(128, 256)
    assert takes_tiles(plain, wide, H100)
    assert not takes_tiles(residual, wide, H100)  # no room for as much of the residual
    assert not takes_tiles(plain, replace(wide, num_stages=4), H100)
    assert takes_tiles(plain, replace(wide, num_stages=4, strips=2), H100)
    assert not takes_tiles(plain, replace(wide, num_warps=4), H100)  # 256 sums a thread
    assert not takes_tiles(plain, replace(SMALL, num_warps=16), H100)  # less than one
    assert not takes_tiles(gated, replace(default_wide(gated), strips=2), H100)


@pytest.mark.parametrize("shared", [False, True])
def test_defaults_compile_ahead_of_time_and_do_not_spill(shared: bool) -> None:
    """The gated one, and one whose steps are shared and that reads a residual."""
    form = replace(PLAIN, k=4096, n=4096, behind=("residual",)) if shared else GATED
    problem = taken(form if shared else replace(form, k=4096, n=14336))
    tiles = replace(default_wide(problem), shared=shared, flat=not shared)
    (launch,) = compile_for(wide_source(problem, H100, tiles), 90)
    assert launch.spills == 0
    assert launch.shared <= wide_shared_bytes(problem, tiles) <= H100.shared_memory_per_block

"""Cascade attention in Triton against the op's reference over shared pages, in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_forms import Group, cascade_call, cascade_operands_of, cascade_truth
from paged_forms import OP, Shape, decode_call, layouts_of
from tilewright.codegen.program import Call
from tilewright.codegen.triton.kernels import paged_decode_tiles
from tilewright.codegen.triton.kernels.cascade import (
    DEFAULTS,
    HOPPER,
    SPACE,
    Tiles,
    cascade_source,
    cascades,
    default_tiles,
    emit_cascade,
    fits,
    num_splits,
)
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem
from tilewright.codegen.triton.lowering import lower_graph
from tilewright.codegen.triton.source import KernelSource
from tilewright.errors import UnsupportedError
from tilewright.ir.dims import evaluate
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.targets import TARGETS
from triton_running import SPILLED, compile_for, run_interpreted

H100 = TARGETS["h100"]
OWN = paged_decode_tiles.Tiles(block_n=16, num_warps=1, num_stages=1, min_keys=16)
SMALL = Tiles(block_m=16, block_n=16, num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and workspaces are NaN before a kernel writes them; splits are short."""
    empty = torch.empty

    def poisoned(*size, **options) -> torch.Tensor:
        memory = empty(*size, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr("tilewright.codegen.triton.kernels.cascade.MIN_KEYS", 16)


def problem_of(node: Node) -> Problem:
    problem = Problem.of(node, layouts_of(node))
    assert problem is not None
    return problem


def source_of(
    node: Node, tiles: Tiles = SMALL, splits: int = 2, own_splits: int = 2
) -> KernelSource:
    source = cascade_source(problem_of(node), tiles, H100, splits, OWN, own_splits)
    assert source is not None
    return source


def check(
    shape: Shape,
    groups: Sequence[Group],
    tiles: Tiles = SMALL,
    splits: int = 2,
    own_splits: int = 2,
    seed: int = 0,
    **attrs,
) -> torch.Tensor:
    node = cascade_call(shape, **attrs)
    operands, sizes = cascade_operands_of(shape, groups, seed)
    (found,) = run_interpreted(source_of(node, tiles, splits, own_splits), node, operands, sizes)
    wanted = cascade_truth(node, operands)
    relative, absolute = OP.tolerance[shape.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)
    return found


GROUPS = st.lists(
    st.builds(
        Group, st.integers(0, 5), st.lists(st.sampled_from([1, 5, 16, 40]), min_size=1, max_size=3)
    ),
    min_size=1,
    max_size=3,
)
SHAPES = st.builds(
    Shape,
    group=st.sampled_from([1, 3, 4]),
    kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 24]),
    value_dim=st.sampled_from([8, 16]),
    page=st.sampled_from([1, 7, 8, 16]),
    paged=st.booleans(),
    sinks=st.booleans(),
    strided=st.booleans(),
    dtype=st.sampled_from([DType.F32, DType.F32, DType.BF16]),
)
CUTS = st.builds(
    Tiles, st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.just(4), st.just(1)
)


@settings(max_examples=2)
@given(
    SHAPES,
    GROUPS,
    CUTS,
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([None, 5.0]),
    st.integers(0, 99),
)
def test_any_groups_and_cuts_give_the_truth(shape, groups, tiles, splits, own, softcap, seed):
    check(shape, groups, tiles, splits, own, seed, softcap=softcap)


@pytest.mark.quick
def test_groups_that_fill_several_tiles_or_share_one() -> None:
    """Tiles of 4 sequences: groups of 5 and of 2 meet in the second one, with one of no group."""
    shape = Shape(group=4, kv_heads=1, page=8, paged=True)
    check(shape, [Group(5, [1, 3, 9, 8, 20]), Group(2, [1, 7]), Group(0, [30])], splits=3)


def test_without_groups_nothing_is_shared() -> None:
    shape = Shape(group=2, kv_heads=1, page=8, sinks=True)
    check(shape, [Group(0, [30, 5, 1])], splits=3, own_splits=1)
    check(shape, [Group(0, [40])], own_splits=3)


def test_an_idle_row_gives_zero() -> None:
    shape = Shape(group=2, kv_heads=1, page=8)
    node = cascade_call(shape)
    operands, sizes = cascade_operands_of(shape, [Group(2, [3, 9]), Group(0, [1])], 0)
    idle = int(operands[-3][2])
    operands[4][idle] = 0
    (found,) = run_interpreted(source_of(node), node, operands, sizes)
    assert not found[idle].any() and found.isfinite().all()


def test_defaults_give_the_truth() -> None:
    shape = Shape(group=4, kv_heads=1, page=16, paged=True, head_dim=64, dtype=DType.BF16)
    shape = replace(shape, value_dim=64)
    node = cascade_call(shape)
    source = emit_cascade(node, layouts_of(node), H100.override(sms=4))
    assert source is not None
    operands, sizes = cascade_operands_of(shape, [Group(9, [1, 20, 5])], 0)
    (found,) = run_interpreted(source, node, operands, sizes)
    torch.testing.assert_close(found.double(), cascade_truth(node, operands), rtol=3e-2, atol=3e-2)


def test_what_sees_less_or_knows_of_no_groups_is_not_taken() -> None:
    for shape, attrs in ((Shape(), {"window": 5}), (Shape(alibi=True), {})):
        node = cascade_call(shape, **attrs)
        assert not cascades(node) and emit_cascade(node, layouts_of(node), H100) is None
    plain = decode_call(Shape())
    assert cascades(plain) and emit_cascade(plain, layouts_of(plain), H100) is None
    wide = cascade_call(Shape(group=200, kv_heads=1))
    assert emit_cascade(wide, layouts_of(wide), H100) is None  # no tile holds its heads


def test_steps_by_groups_are_a_call_of_their_own_and_never_where_sums_must_not_vary() -> None:
    """The order of a row's sums would depend on its group."""
    graph = Graph("g", *_told())
    calls = lower_graph(graph, H100)[0].calls
    assert [_name(call) for call in calls if call.runs_at({"shared": 1})] == ["cascade"]
    assert [_name(call) for call in calls if call.runs_at({})] == ["paged_decode"]
    with pytest.raises(UnsupportedError, match="deterministic=True with paged_attention"):
        lower_graph(graph, H100, deterministic=True)


def _told() -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Inputs and outputs of a graph of one attention that may read shared pages once."""
    node = cascade_call(Shape(kv_heads=1, page=16, head_dim=16, value_dim=16))
    tables = node.operands[3]
    inputs = (*node.operands[:3], *tables.operands, *node.operands[4:])
    return inputs, (node,)


def _name(call: Call) -> str:
    return call.kernel.rsplit("/", 1)[1].rsplit("-", 1)[0]


def test_tiles_fit_and_splits_fill_the_target() -> None:
    shape = Shape(head_dim=128, value_dim=128, kv_heads=8, page=16, paged=True, dtype=DType.BF16)
    problem = problem_of(cascade_call(shape))
    tiles = default_tiles(problem, H100)
    assert tiles == HOPPER and fits(problem, tiles, H100)
    for other in ("a100", "l4", "b200"):  # where it spills
        assert default_tiles(problem, TARGETS[other]) == DEFAULTS[False][0][1]
    assert not fits(problem, replace(tiles, block_n=128, num_stages=4), H100)
    splits = num_splits(problem, tiles, H100)
    for count, width in ((64, 600), (8, 600), (1, 600), (64, 20), (4096, 600)):
        found = evaluate(splits, {"B": count, "M": width})
        programs = found * 8 * -(-count // (tiles.block_m // 4))
        assert found == 1 or programs <= tiles.waves * H100.sms
        assert (found - 1) * tiles.least * tiles.block_n < width * 16
    assert set(SPACE) <= {"block_m", "block_n", "num_warps", "num_stages", "waves"}


def test_compiled_for_an_h100_it_spills_nothing() -> None:
    shape = Shape(head_dim=128, value_dim=128, kv_heads=8, page=16, paged=True, dtype=DType.BF16)
    node = cascade_call(shape)
    source = emit_cascade(node, layouts_of(node), H100)
    assert source is not None
    resources = compile_for(source, 90)
    assert [launch.function for launch in source.variants[0].launches] == ["shared", "own", "join"]
    assert len(resources) == 3 and all(each.spills <= SPILLED for each in resources)

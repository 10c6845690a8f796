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
from tilewright.codegen.triton.kernels import paged_decode_tiles
from tilewright.codegen.triton.kernels.cascade import (
    DEFAULTS,
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
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.dims import evaluate
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.targets import TARGETS
from triton_running import compile_for, run_interpreted

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


@settings(max_examples=3)
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

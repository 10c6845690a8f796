"""Cascade attention on a GPU, against float64: random groups and cuts, in poisoned memory; and an
engine whose sequences share a prefix.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewright as tw
from cascade_forms import Group, cascade_call, cascade_operands_of, cascade_truth
from gpu_kernels import PHASES, examples, here, loaded, poisoned_kernels
from paged_forms import OP, Shape, layouts_of
from random_schedules import HAPPEN, MAX_LEN, MOST, PAGE, Schedule
from tilewright.codegen.triton.kernels.cascade import (
    SPACE,
    Tiles,
    cascade_source,
    default_tiles,
    fits,
)
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.runtime import executor
from tilewright.runtime.decode_graphs import DecodeGraphs
from tiny_models import PROMPTS, tiny_model

pytestmark = pytest.mark.gpu
SHAPES = st.builds(
    Shape,
    group=st.sampled_from([1, 3, 4, 8]),
    kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    value_dim=st.sampled_from([16, 64, 128]),
    page=st.sampled_from([1, 7, 16, 64]),
    paged=st.booleans(),
    sinks=st.booleans(),
    strided=st.booleans(),
    dtype=st.sampled_from([DType.F32, DType.BF16, DType.BF16, DType.F16]),
)
TAILS = st.lists(st.sampled_from([1, 5, 64, 300]), min_size=1, max_size=24)
GROUPS = st.lists(st.builds(Group, st.sampled_from([0, 1, 5, 40]), TAILS), min_size=1, max_size=3)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Shape, Node, KernelSource]:
    """A shape with the default tiles, or with others that fit."""
    shape, target = draw(SHAPES), here()
    node = cascade_call(shape, softcap=draw(st.sampled_from([None, None, 5.0])))
    problem = Problem.of(node, layouts_of(node))
    assert problem is not None
    tiles = default_tiles(problem, target)
    assert tiles is not None
    other = Tiles(**{name: draw(st.sampled_from(values)) for name, values in SPACE.items()})
    if shape.dtype is not DType.F32 and fits(problem, other, target):
        tiles = draw(st.sampled_from([tiles, other]))
    source = cascade_source(problem, tiles, target)
    assert source is not None
    return shape, node, source


def test_cascade() -> None:
    drawn = examples(calls(), 12)
    kernels = poisoned_kernels([(source, node) for _, node, source in drawn])

    @settings(max_examples=10, phases=PHASES)
    @given(groups=GROUPS, seed=st.integers(0, 9999))
    def agree(groups: list[Group], seed: int) -> None:
        for (shape, node, _), kernel in zip(drawn, kernels, strict=True):
            operands, sizes = cascade_operands_of(shape, groups, seed)
            there = [None if x is None else x.cuda() for x in operands]
            (found,) = kernel(there, sizes)
            relative, absolute = OP.tolerance[shape.dtype]
            wanted = cascade_truth(node, operands)
            torch.testing.assert_close(found.cpu().double(), wanted, rtol=relative, atol=absolute)

    agree()


def test_groups_may_change_between_replays_of_a_graph() -> None:
    shape = Shape(group=4, kv_heads=2, page=16, paged=True, dtype=DType.BF16)
    shape = replace(shape, head_dim=64, value_dim=64)
    node = cascade_call(shape)
    problem = Problem.of(node, layouts_of(node))
    assert problem is not None
    source = cascade_source(problem, default_tiles(problem, here()), here())
    ((kernel,),) = loaded([(source, node)], LaunchedKernel)
    operands, sizes = cascade_operands_of(shape, [Group(40, [5] * 9), Group(7, [64, 1])], 1)
    there = [None if x is None else x.cuda() for x in operands]
    kernel(there, sizes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (found,) = kernel(there, sizes)
    alone = [*operands[:6], *(torch.zeros_like(x) for x in operands[6:])]
    for given_ in (operands, alone):
        for mine, theirs in zip(there[6:], given_[6:], strict=True):
            mine.copy_(theirs)
        graph.replay()
        wanted = cascade_truth(node, given_)
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=3e-2, atol=3e-2)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are told of shared pages wherever there are any."""
    monkeypatch.setattr(executor, "SHARED_BYTES", -(1 << 40))


def test_an_engine_gives_the_same_tokens_with_and_without(always) -> None:
    model = tiny_model("llama")
    common = [*PROMPTS[2], *PROMPTS[1]]
    prompts = [[*common, 3 + i, 5 * i] for i in range(6)]
    params = tw.SamplingParams(max_new_tokens=20, ignore_eos=True)
    engine = tw.compile(model, backend="triton", max_batch_size=8)
    engine.generate([common], tw.SamplingParams(max_new_tokens=1))
    wanted = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
    graphs = engine.executor.graphs
    assert isinstance(graphs, DecodeGraphs) and not graphs.shared
    found = [completion.token_ids for completion in engine.generate(prompts, params)]
    assert found == wanted and graphs.shared


def test_a_warm_engine_captures_nothing_more_for_steps_by_groups(always) -> None:
    engine = tw.compile(tiny_model("llama"), backend="triton", max_batch_size=8)
    engine.warm_up()
    graphs = engine.executor.graphs
    assert isinstance(graphs, DecodeGraphs)
    before = dict(graphs.captured), dict(graphs.shared)
    assert [sorted(each) for each in before] == [[1, 2, 4, 8], [2, 4, 8]]
    common = [*PROMPTS[2], *PROMPTS[1]]
    params = tw.SamplingParams(max_new_tokens=8, ignore_eos=True)
    for count in (1, 3, 8):
        engine.generate([[*common, 3 + i] for i in range(count)], params)
    assert (graphs.captured, graphs.shared) == before


def test_random_schedules_give_the_tokens_of_each_request_alone(always) -> None:
    """In float32, in which no two logits of this model are nearer than sums differ."""
    engine = tw.compile(
        tiny_model("llama"),
        backend="triton",
        dtype="float32",
        kv_cache=tw.KVCacheConfig(page_size=PAGE, swap_space=0.25),
        max_model_len=MAX_LEN,
        max_batch_size=4,
    )
    params = tw.SamplingParams(max_new_tokens=MOST, ignore_eos=True)

    @lru_cache(maxsize=4096)
    def alone(prompt: tuple[int, ...]) -> list[int]:
        engine.reset_prefix_cache()
        return engine.generate([list(prompt)], params)[0].token_ids

    happened: Counter[str] = Counter()
    for seed in range(40):
        schedule = Schedule(engine, alone, random.Random(seed), happened)
        schedule.run(12)
        graphs = schedule.loop.executor.graphs
        happened["steps by groups"] += len(graphs.shared)
    assert all(happened[one] for one in (*HAPPEN, "steps by groups")), happened

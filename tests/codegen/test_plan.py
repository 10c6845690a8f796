"""The buffer plan: the Program is played out in the arena, and nobody may find another's bytes."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.eager.backend import BACKEND
from tilewright.codegen.plan import ALIGNMENT, MemoryPlan, plan_buffers
from tilewright.codegen.program import Call, Program
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.compiler.lowering import lower
from tilewright.errors import GraphError
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.parser import parse_graph
from tilewright.ir.types import TensorType
from tilewright.passes.driver import run_passes
from tilewright.passes.fuse import fuse
from tilewright.passes.pipeline import pipeline
from tilewright.targets import Target
from tiny_models import tiny_model


def lowered(text: str) -> Program:
    return BACKEND.lower(parse_graph(text), Target.parse("cpu")).program


def play(program: Program, plan: MemoryPlan) -> None:
    """Runs the Program on an arena of owners instead of bytes."""
    place = {p.buffer: p for p in plan.placements}
    owner_of = {name: p.buffer for p in plan.placements for name in (p.buffer, *p.shared_by)}
    arena: dict[int, str] = {}

    def lines(owner: str) -> range:
        p = place[owner]
        assert p.offset is not None and p.offset % ALIGNMENT == 0
        assert p.offset + p.size <= plan.peak
        return range(p.offset, p.offset + p.padded, ALIGNMENT)

    fullest = 0
    for index, call in enumerate(program.calls):
        touched = {owner_of[n] for n in (*call.operands, *call.results) if n is not None}
        temporary = [o for o in touched if place[o].role == "temporary"]
        for owner in temporary:
            if place[owner].first == index:
                arena.update(dict.fromkeys(lines(owner), owner))
        for owner in temporary:
            assert all(arena[line] == owner for line in lines(owner)), f"{owner} at call {index}"
        live = [p for p in plan.temporaries if p.first <= index <= p.last]
        fullest = max(fullest, sum(p.padded for p in live))
    assert plan.lower_bound == fullest == max(plan.live_bytes(), default=0)
    assert plan.peak >= plan.lower_bound


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Calls over buffers of random sizes: some results in place, some views, some never read."""
    buffers = {"x": TensorType(DType.F32, (16,)), "w": TensorType(DType.F32, (16,))}
    names, calls = ["x", "w"], []
    for index in range(draw(st.integers(1, 24))):
        operands = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)))
        results, aliases = [], []
        for position in range(draw(st.integers(1, 2))):
            name = f"b{index}_{position}"
            if draw(st.integers(0, 5)) == 0:
                buffers[name] = buffers[operands[0]]
                aliases.append((position, 0))
            else:
                buffers[name] = TensorType(DType.F32, (draw(st.integers(0, 2000)),))
            results.append(name)
        names += results
        calls.append(Call("eager/op", operands, tuple(results), aliases=tuple(aliases)))
    return Program("p", buffers, ("x",), {"w": "w"}, (("y", names[-1]),), tuple(calls))


@pytest.mark.quick
@given(programs())
def test_nothing_live_is_overwritten(program: Program):
    plan = plan_buffers(program, {})
    play(program, plan)
    assert plan == plan_buffers(program, {})


CHAIN = """
def g(x: f32[T, 64], w: f32[64, 64]):
    a: f32[T, 64] = relu(x)
    b: f32[T, 64] = linear(a, w)
    c: f32[T, 64] = relu(b)
    d: f32[T, 64] = linear(c, w)
    return {"y": d}
"""


@pytest.mark.quick
def test_a_chain_takes_two_places():
    plan = plan_buffers(lowered(CHAIN), {"T": 4})
    row = 4 * 64 * 4
    assert plan.peak == plan.lower_bound == 2 * row
    assert plan.bytes_of("temporary") == 3 * row
    assert plan.bytes_of("output") == row
    assert plan.bytes_of("input") == row + 64 * 64 * 4
    assert plan.live_bytes() == [row, 2 * row, 2 * row, row]
    assert [(p.buffer, p.first, p.last) for p in plan.temporaries] == [
        ("relu_0", 0, 1),
        ("linear_0", 1, 2),
        ("relu_1", 2, 3),
    ]


def test_sizes_are_rounded_up_and_symbols_are_needed():
    program = lowered(CHAIN)
    assert plan_buffers(program, {"T": 1}).peak == 512
    assert plan_buffers(program, {"T": 0}).peak == 0
    with pytest.raises(GraphError, match="symbol T"):
        plan_buffers(program, {})


VIEWS = """
def g(x: f32[T, 8]):
    a: f32[T, 8] = relu(x)
    b: f32[T, 4] = slice(a, dim=1, start=0, stop=4)
    c: f32[T, 2, 2] = reshape(b, shape=(T, 2, 2))
    d: f32[2, T, 2] = permute(c, dims=(1, 0, 2))
    e: f32[2*T, 2] = reshape(d, shape=(2*T, 2))
    f: f32[2*T, 2] = exp(e)
    return {"y": f}
"""


def test_views_share_memory_and_copies_do_not():
    plan = plan_buffers(lowered(VIEWS), {"T": 3})
    # The last reshape would have to reorder: it is a copy.
    found = [(p.buffer, p.shared_by) for p in plan.temporaries]
    assert found == [("relu_0", ("slice_0", "reshape_0", "permute_0")), ("reshape_1", ())]
    assert plan.free_calls == (1, 2, 3)
    # A view keeps what it views alive.
    assert (plan.temporaries[0].first, plan.temporaries[0].last) == (0, 4)


def test_views_agree_with_torch():
    x = torch.zeros(3, 8)
    assert x[:, :4].reshape(3, 2, 2).data_ptr() == x.data_ptr()
    assert x[:, :4].reshape(3, 2, 2).permute(1, 0, 2).reshape(6, 2).data_ptr() != x.data_ptr()


STATE = """
def g(new: f32[T, 2, 8], slots: i64[T], cache: f32[N, 4, 2, 8]):
    a: f32[T, 2, 8] = relu(new)
    b: f32[N, 4, 2, 8] = kv_write(cache, a, slots)
    return {"y": a, "cache": b}
"""


def test_state_is_written_in_place_and_outside_of_the_arena():
    plan = plan_buffers(lowered(STATE), {"T": 3, "N": 2})
    (state,) = (p for p in plan.placements if p.role == "state")
    assert (state.buffer, state.shared_by) == ("cache", ("kv_write_0",))
    assert plan.temporaries == () and plan.peak == 0
    assert plan.bytes_of("state") == 2 * 4 * 2 * 8 * 4


def test_an_output_that_nothing_computes_is_planned():
    plan = plan_buffers(lowered('def g(x: f32[T]):\n    return {"y": x}\n'), {"T": 2})
    assert [(p.buffer, p.role) for p in plan.placements] == [("x", "input")]


def test_a_plan_is_plain_data():
    plan = plan_buffers(lowered(CHAIN), {"T": 4})
    data = json.loads(json.dumps(plan.to_json()))
    assert data["peak"] == 2048 and data["num_calls"] == 4 and data["sizes"] == {"T": 4}
    assert data["placements"][0] == {
        "buffer": "relu_0",
        "role": "temporary",
        "size": 1024,
        "first": 0,
        "last": 1,
        "offset": 0,
        "shared_by": [],
    }


@pytest.fixture(scope="module")
def decoder() -> Graph:
    graph = lower(capture_causal_lm(tiny_model("llama")), "llama")
    return run_passes(graph, pipeline("paged"))[0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_decoder_takes_no_more_than_its_fullest_call(decoder: Graph, fused: bool):
    graph = fuse(decoder) if fused else decoder
    program = BACKEND.lower(graph, Target.parse("cpu")).program
    for tokens, rows in ((3, 3), (64, 1), (200, 5)):
        plan = plan_buffers(program, {"T": tokens, "B": 3, "M": 4, "R": rows, "N": 16, "P": 4})
        play(program, plan)
        assert plan.peak == plan.lower_bound
        # The last layer's are of the rows that logits are wanted of.
        assert 3 * plan.peak < plan.bytes_of("temporary")

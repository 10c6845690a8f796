"""Fusion of whole graphs: random ones, by numbers; a captured decoder, by its calls a layer."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewriting import assert_same_numbers, draw_inputs
from tilewright.codegen.eager.backend import BACKEND
from tilewright.codegen.program import Program
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.compiler.lowering import lower
from tilewright.ir.build import cast, const, input_node, make, reshape
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.ops.control import body_of
from tilewright.ir.parser import parse_graph
from tilewright.ir.types import TensorType
from tilewright.ir.verifier import verify
from tilewright.passes.driver import run_passes
from tilewright.passes.fuse import fuse
from tilewright.passes.fuse_inline import INLINE_FUSED, inline_fused
from tilewright.passes.pipeline import pipeline
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import Target
from tiny_models import tiny_config

T = symbol("T")
WIDE = TensorType(DType.F64, (T, 6))
UNARY = ("sin", "tanh", "neg", "abs", "sigmoid")
BINARY = ("add", "mul", "sub", "maximum")


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Values [T, 6] of elementwise ops, reductions over either axis, views, lookups, products."""
    inputs = (
        input_node("x", WIDE),
        input_node("y", WIDE),
        input_node("row", TensorType(DType.F64, (6,))),
        input_node("square", TensorType(DType.F64, (6, 6))),
        input_node("ids", TensorType(DType.I64, (T,))),
    )
    values = list(inputs[:2])
    for _ in range(draw(st.integers(1, 14))):
        values.append(draw(_nodes(values, inputs)))
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True))
    return Graph("g", inputs, tuple(outputs))


@st.composite
def _nodes(draw: st.DrawFn, values: list[Node], inputs: tuple[Node, ...]) -> Node:
    """A value [T, 6]."""
    x, y = draw(st.sampled_from(values)), draw(st.sampled_from(values))
    row, square, ids = inputs[2:]
    kind = draw(st.integers(0, 11))
    if kind == 0:
        return make("linear", x, square)
    if kind == 1:
        return make(
            "add", x, make(draw(st.sampled_from(["mean", "amax"])), y, dims=(1,), keepdim=True)
        )
    if kind == 2:
        return make("mul", x, make("mean", y, dims=(0,), keepdim=True))
    if kind == 3:
        total = reshape(make("sum", y, dims=(1,)), T, 1)
        return make("add", x, make("expand", total, shape=(T, 6)))
    if kind == 4:
        return make("rms_norm", x, row, eps=1e-3)
    if kind == 5:
        return make("softmax", x, dim=draw(st.integers(0, 1)))
    if kind == 6:
        start = draw(st.integers(0, 5))
        return make("mul", x, make("slice", y, dim=1, start=start, stop=start + 1))
    if kind == 7:
        return make("index_select", x, ids, dim=0)
    if kind == 8:
        return make("add", x, make("expand", make("tanh", row), shape=(T, 6)))
    if kind == 9:
        narrow = cast(cast(x, DType.F32), DType.F64)
        return make("mul", narrow, const(0.5, DType.F64))
    if kind == 10:
        return make(draw(st.sampled_from(UNARY)), x)
    return make(draw(st.sampled_from(BINARY)), x, y)


@pytest.mark.quick
@given(graphs(), st.integers(5, 7))
def test_random_graphs_keep_their_numbers(graph: Graph, tokens: int):
    verify(graph)
    fused = fuse(graph)
    assert_same_numbers(graph, fused, {"T": tokens}, tolerance=0)
    assert fuse(fused) == fused
    assert inline_fused(fused) == graph
    assert parse_graph(str(fused)) == fused


@given(graphs())
def test_members_of_random_graphs_are_all_in_bodies(graph: Graph):
    outside = {node.op for node in fuse(graph).calls()}
    free = {"linear", "fused", "expand", "reshape", "slice"}
    # Over the rows' axis nothing is a member.
    along_rows = {"mean", "softmax"}
    assert outside <= free | along_rows


@given(graphs())
def test_programs_of_fused_graphs_give_the_same_numbers(graph: Graph):
    inputs = draw_inputs(graph, {"T": 6}, torch.Generator().manual_seed(0))
    results = []
    for each in (graph, fuse(graph)):
        program = BACKEND.lower(each, Target.parse("cpu")).program
        read_back = Program.from_json(json.loads(json.dumps(program.to_json())))
        assert read_back == program
        runner = ProgramRunner(read_back, {}, lambda name: b"")
        results.append(
            runner.run({n.attr("name"): t for n, t in zip(graph.inputs, inputs, strict=True)})
        )
    before, after = results
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def decoder(layers: int) -> Graph:
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama")
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    graph = lower(capture_causal_lm(model), "llama")
    samples = [torch.randint(0, 160, (1, 9))]
    passes = pipeline("paged", fuses=True)
    fused, records = run_passes(graph, passes, level="sample", samples=samples)
    # The very same calls on the very same numbers.
    assert records[-1].max_error == 0.0
    back, _ = run_passes(fused, [INLINE_FUSED])
    assert back == records[-2].graph
    return fused


def test_calls_of_a_llama_layer():
    """Launches a layer at decode: 9, of which 3 are generated. Views cost nothing."""
    graphs = [decoder(layers) for layers in (2, 3)]
    one, two = (Counter(node.op for node in graph.calls()) for graph in graphs)
    layer = two - one
    views = {op: layer.pop(op) for op in ("slice", "reshape")}
    assert layer == {"linear": 4, "fused": 3, "append_kv": 1, "paged_attention": 1}
    assert layer.total() == 9
    assert views == {"slice": 3, "reshape": 4}
    bodies = [Counter(_stem(n) for n in g.nodes if n.op == "fused") for g in graphs]
    assert bodies[1] - bodies[0] == {"add_rms_norm": 2, "gated": 1}
    # A third layer brings no kernel that two did not have. The last one computes few rows: its own.
    known, again = ({n.attr("body") for n in g.nodes if n.op == "fused"} for g in graphs)
    assert known == again and len(known) == 9


def _stem(node: Node) -> str:
    return body_of(node).name.rsplit("_", 1)[0]

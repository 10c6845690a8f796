"""A gated product of many tokens in Triton against its body in float64."""

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
from tilewright.codegen.program import Call
from tilewright.codegen.triton.kernels.wide_linear import (
    FEWEST,
    WideTiles,
    takes_wide,
    wide_source,
)
from tilewright.codegen.triton.lowering import lower_graph
from tilewright.codegen.triton.wide import find_wide
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType
from tilewright.passes.fuse import fuse
from tilewright.targets import TARGETS
from triton_running import compile_for, run_interpreted

H100, T = TARGETS["h100"], symbol("T")
PLAIN = Form(k=48, n=24, dtype=DType.BF16, halves=True)
SMALL = WideTiles(16, 16, 16, 2, 2, 2)
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


@settings(max_examples=12, deadline=None, phases=PHASES)
@given(
    tokens=st.integers(1, 70),
    n=st.sampled_from([8, 24, 40]),
    k=st.sampled_from([16, 40, 72]),
    dtype=st.sampled_from([DType.F16, DType.BF16]),
    behind=st.sampled_from([(), ("scaled",), ("capped", "square")]),
    group=st.integers(1, 3),
    programs=st.integers(1, 4),
)
def test_it_is_the_body_in_float64(tokens, n, k, dtype, behind, group, programs) -> None:
    form = replace(PLAIN, k=k, n=n, dtype=dtype, behind=behind)
    node = node_of(form)
    problem = problem_of(node)
    assert problem is not None and takes_wide(problem, H100)
    source = wide_source(problem, programs, replace(SMALL, group=group))
    bases, operands = operands_of(form, tokens)
    (found,) = run_interpreted(source, node, bases, {"B": tokens})
    assert_close(form, found, in_float64(body_of(form), operands))


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": DType.F32},
        {"norm": "weight"},
        {"bias": True},
        {"behind": ("residual",)},
        {"halves": False},
        {"strided": True},  # rows that begin elsewhere than descriptors can
        {"k": 44},  # rows of the weight that are not 16 bytes apart
        {"n": 20},
    ],
)
def test_other_products_are_declined(changed) -> None:
    problem = problem_of(node_of(replace(PLAIN, **changed)))
    assert problem is not None and not takes_wide(problem, H100)


def test_targets_where_it_was_not_measured_are_declined() -> None:
    problem = problem_of(node_of(PLAIN))
    assert problem is not None
    assert not any(takes_wide(problem, TARGETS[name]) for name in ("a100", "b200", "cpu"))


def test_the_default_compiles_ahead_of_time_and_does_not_spill() -> None:
    problem = problem_of(node_of(replace(PLAIN, k=4096, n=14336)))
    assert problem is not None
    (launch,) = compile_for(wide_source(problem, H100.sms), 90)
    assert launch.spills == 0 and launch.shared <= H100.shared_memory_per_block


def gated(product: Node, n: int) -> Node:
    halves = (make("slice", product, dim=1, start=s, step=1, stop=s + n) for s in (0, n))
    return make("gated", *halves, activation="silu")


def graph_of(n: int = 8192, *, read_twice: bool = False, copied: bool = False) -> Graph:
    x = rows = input_node("x", TensorType(DType.BF16, (T, 8, 8) if copied else (T, 64)))
    if copied:  # each row's matrix in the other order
        rows = make("reshape", make("permute", x, dims=(0, 2, 1)), shape=(T, 64))
    weight = input_node("w", TensorType(DType.BF16, (2 * n, 64)))
    product = make("linear", rows, weight, None)
    outputs = (gated(product, n), *([product] if read_twice else []))
    names = ("out", "product")[: len(outputs)]
    return fuse(Graph("mlp", (x, weight), outputs, {}, names))


def test_a_product_and_the_gate_that_alone_reads_it_are_found() -> None:
    found = find_wide(graph_of(), H100)
    assert len(found) == 2 and len(set(map(id, found.values()))) == 1
    (wide,) = {id(one): one for one in found.values()}.values()
    for tokens in (1, FEWEST - 1, FEWEST, 4 * FEWEST):
        own, others = (
            Call("x/y", (), (), guard=guard).runs_at({"T": tokens})
            for guard in (wide.guard, wide.otherwise)
        )
        assert own == (tokens >= FEWEST) and own != others
    assert not find_wide(graph_of(read_twice=True), H100)
    assert not find_wide(graph_of(4096), H100)  # 128 tiles for 132 multiprocessors
    assert not find_wide(graph_of(), TARGETS["b200"])


def test_what_both_ways_read_is_made_for_both() -> None:
    program, _, _ = lower_graph(graph_of(copied=True), H100)
    (wide,) = (
        call for call in program.calls if call.origin[0] == "linear" and len(call.origin) > 1
    )
    (maker,) = (call for call in program.calls if wide.operands[0] in call.results)
    assert wide.guard and not maker.guard
    assert sum(bool(call.guard) for call in program.calls) == 3

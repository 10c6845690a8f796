"""Products of many tokens in a Program: which are found, who computes them at how many tokens by
default and by a tuner's records, and that the numbers are those of float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from handed_forms import drawn
from linear_forms import ERROR, B, Form, node_of
from tilewright.autotune.store import Store
from tilewright.codegen.program import Program
from tilewright.codegen.triton.backend import BACKEND, OwnBytes
from tilewright.codegen.triton.kernels.wide_linear_tiles import FEWEST, WideTiles, default_wide
from tilewright.codegen.triton.lowering import lower_graph
from tilewright.codegen.triton.package import KernelPackage
from tilewright.codegen.triton.tuning.beside_library import is_library
from tilewright.codegen.triton.tuning.conditions import conditions_here
from tilewright.codegen.triton.tuning.problems import GEMM, WIDE, problems_of
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.codegen.triton.wide import BUCKETS, find_wide, wide_products
from tilewright.ir.build import input_node, make, param
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType
from tilewright.ir.widen import widened
from tilewright.passes.fuse import fuse
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import TARGETS
from tuning_records import choice_of

H100 = TARGETS["h100"]
CUT = WideTiles(64, 32, 16, 2, 4, 2)  # few programs: the interpreter takes one at a time
SHARED = WideTiles(64, 16, 16, 2, 4, 2, 1, True, False)


@dataclass
class Told:
    """A tuner that has these cuts from so many tokens on, None for the library's, and the default
    where it has nothing; and what it was asked."""

    cuts: Mapping[int, WideTiles | None]
    asked: list[tuple[int, WideTiles | None]] = field(default_factory=list)

    def wide(self, node: Node, tokens: int, default: WideTiles | None) -> WideTiles | None:
        self.asked.append((tokens, default))
        return self.cuts.get(tokens, default)

    def walk(self, node: Node) -> None:
        return None

    decode = prefill = expert_rows = expert_groups = walk


def halves(product: Node, n: int, step: int = 1) -> Node:
    """The gate of a product's halves, or of its even and odd columns."""
    starts = (0, n) if step == 1 else (0, 1)
    stops = (n, 2 * n) if step == 1 else (2 * n, 2 * n)
    ends = zip(starts, stops, strict=True)
    both = (make("slice", product, dim=1, start=a, step=step, stop=b) for a, b in ends)
    return make("gated", *both, activation="silu")


def graph_of(
    n: int = 8192,
    k: int = 64,
    *,
    kind: str = "gated",
    read_twice: bool = False,
    copied: bool = False,
) -> Graph:
    x = rows = input_node("x", TensorType(DType.BF16, (B, 8, k // 8) if copied else (B, k)))
    if copied:  # each row's matrix in the other order
        rows = make("reshape", make("permute", x, dims=(0, 2, 1)), shape=(B, k))
    parts = 2 if kind in ("gated", "interleaved") else 1
    weight = param("w", TensorType(DType.BF16, (parts * n, k)))
    product = make("linear", rows, weight, None)
    beside = input_node("beside", TensorType(DType.BF16, (B, n)))
    inputs = [x]
    if kind == "plain":
        value = product
    elif kind == "residual":
        value = make("add", beside, product)
        inputs.append(beside)
    elif kind == "flat":  # of other columns than the product's
        value = make("tanh", make("reshape", product, shape=(B, 2, n // 2)))
    else:
        value = halves(product, n, 2 if kind == "interleaved" else 1)
    outputs = (value, *([product] if read_twice else []))
    return fuse(Graph("mlp", tuple(inputs), outputs, {}, ("out", "product")[: len(outputs)]))


def kinds(program: Program, tokens: int) -> list[str]:
    return [call.kind for call in program.at({"B": tokens}).calls]


@pytest.mark.quick
def test_untuned_a_gated_product_alone_is_ours_and_from_many_tokens_on() -> None:
    program, _, _ = lower_graph(graph_of(), H100)
    for tokens in (1, FEWEST - 1, FEWEST, 4 * FEWEST, 10**6):
        ours = tokens >= FEWEST
        assert kinds(program, tokens) == (["template"] if ours else ["library", "generated"])
    assert not find_wide(graph_of(read_twice=True), H100)
    assert not find_wide(graph_of(4096), H100)  # 128 tiles for 132 multiprocessors
    assert not find_wide(graph_of(), TARGETS["b200"])
    for kind in ("plain", "residual"):
        program, _, _ = lower_graph(graph_of(kind=kind), H100)
        assert not any(call.guard or call.kind == "template" for call in program.calls)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kind", "ops"),
    [
        ("plain", ["linear"]),
        ("residual", ["linear", "add"]),
        ("gated", ["linear", "gated"]),
        ("interleaved", ["linear"]),  # even and odd columns are no halves
        ("flat", ["linear"]),
    ],
)
def test_what_stands_behind_a_product_is_taken_where_it_fits(kind: str, ops: list[str]) -> None:
    (found,) = wide_products(graph_of(kind=kind), H100)
    assert [m.op for m in (found.problem.linear, *found.problem.members)] == ops
    assert found.problem.parts == (2 if kind == "gated" else 1)
    assert (found.last is found.linear) is (len(ops) == 1)
    (alone,) = wide_products(graph_of(kind=kind, read_twice=True), H100)
    assert alone.last is alone.linear


@pytest.mark.quick
def test_a_tuner_is_asked_once_for_layers_that_are_alike() -> None:
    x = input_node("x", TensorType(DType.BF16, (B, 64)))
    for width in (64, 128):  # of the second layer
        shapes = ((64, 64), (width, 64))
        layers = [param(f"w{i}", TensorType(DType.BF16, s)) for i, s in enumerate(shapes)]
        outputs = tuple(make("linear", x, weight, None) for weight in layers)
        told = Told({512: CUT})
        found = find_wide(Graph("g", (x,), outputs), H100, told)
        assert set(found) == set(outputs)
        assert len(told.asked) == len(BUCKETS) * len({*shapes})


@pytest.mark.quick
def test_a_head_over_fewer_rows_is_left_alone() -> None:
    x, few = (input_node(n, TensorType(DType.BF16, (symbol(s), 64))) for n, s in ("xT", "yL"))
    weights = [param(f"w{i}", TensorType(DType.BF16, (64, 64))) for i in range(3)]
    hidden = make("linear", make("linear", x, weights[0], None), weights[1], None)
    head = make("linear", few, weights[2], None)
    graph = Graph("g", (x, few), (hidden, head))
    assert {str(p.problem.tokens) for p in wide_products(graph, H100)} == {"T"}
    assert not wide_products(Graph("none", (x,), (make("tanh", x),)), H100)


@pytest.mark.quick
def test_what_both_ways_read_is_made_for_both() -> None:
    program, _, _ = lower_graph(graph_of(copied=True), H100)
    (wide,) = (call for call in program.calls if {"linear", "gated"} <= {*call.origin})
    (maker,) = (call for call in program.calls if wide.operands[0] in call.results)
    assert wide.guard and not maker.guard
    assert sum(bool(call.guard) for call in program.calls) == 3


@pytest.mark.quick
def test_each_number_of_tokens_has_one_candidate() -> None:
    told = Told({256: CUT, 512: None, 1024: None, 2048: CUT, 4096: SHARED, 8192: None})
    program, sources, _ = lower_graph(graph_of(), H100, cuts=told)
    assert sum(source.kind == "template" for source in sources) == 2
    for tokens in (1, 255, 256, 511, 512, 2047, 2048, 4095, 4096, 8191, 8192, 10**6):
        ours = 256 <= tokens < 512 or 2048 <= tokens < 8192
        assert kinds(program, tokens) == (["template"] if ours else ["library", "generated"])
    default = default_wide(wide_products(graph_of(), H100)[0].problem)
    wanted = [(tokens, default if tokens >= FEWEST else None) for tokens in BUCKETS]
    assert told.asked == wanted
    everywhere, _, _ = lower_graph(graph_of(), H100, cuts=Told(dict.fromkeys(BUCKETS)))
    assert not any(call.guard for call in everywhere.calls)


@pytest.mark.parametrize("kind", ["plain", "residual", "gated"])
def test_both_sides_of_a_guard_give_the_numbers_of_float64(kind: str) -> None:
    graph = graph_of(24, 32, kind=kind)
    cuts = Told({256: CUT if kind == "residual" else SHARED})
    program, sources, notes = lower_graph(graph, H100, cuts=cuts)
    packages = [KernelPackage(source, {}) for source in sources]
    files = {name: OwnBytes(text) for p in packages for name, text in p.files().items()}
    assert not notes
    for tokens in (255, 256):
        inputs, weights = drawn(graph, tokens)
        runner = ProgramRunner(Program.from_json(program.to_json()), weights, files.__getitem__)
        (found,) = runner.run(inputs).values()
        wide = widened(graph, DType.F64)
        given = [inputs[str(n.attr("name"))].double() for n in wide.inputs]
        (wanted,) = interpret(wide, given, {k: v.double() for k, v in weights.items()})
        error = float((found.double() - wanted).abs().max())
        assert error <= ERROR[DType.BF16] * (1.0 + float(wanted.abs().max())), (kind, tokens)


def tunables(graph: Graph, sequences: int | None = None) -> list[KernelTunable]:
    return [one for one in problems_of(graph, H100, sequences) if one.template.name == WIDE.name]


@pytest.mark.quick
def test_its_problems_are_those_of_graphs_of_any_tokens() -> None:
    found = tunables(graph_of())
    assert [dict(one.key.problem)["from_tokens"] for one in found] == list(BUCKETS)
    assert not tunables(graph_of(), 128)
    assert not any("tokens" in dict(one.key.problem) for one in found)  # as decode steps have
    assert [is_library(one.default) for one in found] == [True] + [False] * 5
    plain = tunables(graph_of(kind="residual"))
    assert all(is_library(one.default) for one in plain) and len(plain) == len(BUCKETS)
    assert dict(plain[0].key.problem)["behind"] == "add"
    assert not any(one.key == other.key for one in plain for other in found)


@pytest.mark.quick
def test_the_library_that_it_is_timed_against_is_the_library() -> None:
    gated = Form(64, 8192, DType.BF16, halves=True)
    decode = KernelTunable.of(GEMM, node_of(gated), {"B": 16}, H100)
    for one in (decode, tunables(graph_of())[-1], tunables(graph_of(kind="plain"))[-1]):
        (config,) = one.pinned
        program, _ = one.template.calls(one.node, config, H100) or pytest.fail("no calls")
        ours = {"library", "generated"}
        assert {call.kind for call in program.calls} <= ours
        assert not any(call.guard for call in program.calls)


def test_a_record_decides_for_its_tokens(tmp_path: Path) -> None:
    graph = graph_of(kind="plain")
    store = Store(tmp_path / "tuning.jsonl")
    for one in tunables(graph):
        if dict(one.key.problem)["from_tokens"] == 1024:
            ours = next(c for c in one.space.configs() if c["shared"] and not is_library(c))
            store.add(choice_of(one, ours, conditions=conditions_here()))
    lowered = BACKEND.lower(graph, TARGETS["cpu"], tuning=store)
    for tokens in (1023, 1024, 2047, 2048):
        ours = 1024 <= tokens < 2048
        assert kinds(lowered.program, tokens) == ["template" if ours else "library"]
    lines = [json.loads(line) for line in lowered.files["tuning.jsonl"].splitlines()]
    used = [one["key"]["problem"]["from_tokens"] for one in lines if one["used"]]
    assert used == [1024] and len(lines) == len(BUCKETS)

"""Products that a template computes at some numbers of tokens and a library at others: the guards
meet without a gap, each side gives the numbers of float64, and what is handed on stays ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from handed_forms import Pair, drawn, graph_of, product_of, truth
from linear_forms import ERROR, B, Form, tensor
from tilewright.codegen.base import Lowered
from tilewright.codegen.plan import plan_buffers
from tilewright.codegen.program import Program
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.backend import BACKEND
from tilewright.codegen.triton.hand_on import hands_on
from tilewright.codegen.triton.kernels.linear_tiles import Cutting
from tilewright.codegen.triton.lowering import lower_graph
from tilewright.codegen.triton.package import KernelPackage
from tilewright.codegen.triton.unfused import Unfused, unfused
from tilewright.compiler.inspect.call_nodes import nodes_of_calls, owners_of_calls
from tilewright.ir.build import make
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.parser import parse_graph
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import TARGETS

H100 = TARGETS["h100"]
GATED = Form(k=48, n=32, dtype=DType.BF16, norm="weight", halves=True, bias=True)
RESIDUAL = Form(k=64, n=48, dtype=DType.BF16, behind=("residual", "gelu"))


@dataclass(frozen=True)
class Told:
    """A tuner that gives these cuts to the library, and knows nothing else."""

    library_at: frozenset[int]
    only: str = ""

    def gemv(self, node: Node) -> None:
        return None

    def gemm(self, node: Node, block_m: int) -> None:
        return None

    def library(self, node: Node, tokens: int) -> bool:
        return tokens in self.library_at and self.only in str(node)


def told(*tokens: int, only: str = "") -> Cutting:
    return Cutting(None, Told(frozenset(tokens), only))


def alone(form: Form) -> Graph:
    return graph_of(product_of("one", form, tensor("x", form.dtype, B, form.k)))


def lowered(graph: Graph, cutting: Cutting) -> Lowered:
    program, sources, notes = lower_graph(graph, H100, cutting=cutting)
    assert not notes
    files = {k: v for s in sources for k, v in KernelPackage(s, {}).files().items()}
    owned = BACKEND.lower(graph, TARGETS["cpu"])  # for the mark of files that this process made
    mark = type(next(iter(owned.files.values())))
    return Lowered(program, {name: mark(content) for name, content in files.items()})


def kinds(program: Program, tokens: int) -> list[str]:
    return [call.kind for call in program.at({"B": tokens}).calls]


def check(graph: Graph, cutting: Cutting, tokens: int) -> None:
    made = lowered(graph, cutting)
    inputs, weights = drawn(graph, tokens)
    program = Program.from_json(made.program.to_json())
    runner = ProgramRunner(program, weights, made.files.__getitem__)
    found = runner.run(inputs)
    for name, wanted in zip(graph.output_names, truth(graph, inputs, weights), strict=True):
        scale = 1.0 + float(wanted.abs().max())
        error = float((found[name].double() - wanted).abs().max())
        assert error <= 2 * ERROR[DType.BF16] * scale, (name, tokens)


@pytest.mark.parametrize("tokens", [1, 64, 65, 128, 130])
@pytest.mark.parametrize("form", [GATED, RESIDUAL], ids=["gated", "residual"])
def test_both_sides_of_a_guard_give_the_numbers_of_float64(form: Form, tokens: int) -> None:
    graph = alone(form)
    check(graph, told(128), tokens)
    program = lowered(graph, told(128)).program
    behind = ["library", "generated"]
    many = behind if form.norm == "none" else ["generated", *behind]
    assert kinds(program, tokens) == (many if tokens > 64 else ["template"])


@pytest.mark.parametrize("tokens", [0, 1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 1000])
@pytest.mark.parametrize(
    "at", [(), (1,), (16,), (64,), (1, 32), (16, 128), (1, 16, 32, 64), (1, 16, 32, 64, 128)]
)
def test_each_number_of_tokens_has_one_candidate(at: tuple[int, ...], tokens: int) -> None:
    program, sources, _ = lower_graph(alone(RESIDUAL), H100, cutting=told(*at))
    bucket = next((m for m in (1, 16, 32, 64, 128) if tokens <= m), 128)
    assert kinds(program, tokens) == (["library", "generated"] if bucket in at else ["template"])
    made = program.at({"B": tokens})
    writers = [name for call in made.calls for name in call.results]
    assert len(set(writers)) == len(writers)
    assert sum(source.kind == "template" for source in sources) <= 1 + len(at)


def test_cuts_that_the_library_stands_for_are_not_compiled() -> None:
    _, ours, _ = lower_graph(alone(RESIDUAL), H100)
    _, sources, _ = lower_graph(alone(RESIDUAL), H100, cutting=told(64, 128))
    template, *_ = (source for source in sources if source.kind == "template")
    assert [len(source.variants) for source in (*ours, template)] == [5, 3]


def test_a_product_that_is_the_librarys_alone_has_no_guards_and_no_template() -> None:
    program, sources, _ = lower_graph(alone(GATED), H100, cutting=told(1, 16, 32, 64, 128))
    assert [call.kind for call in program.calls] == ["generated", "library", "generated"]
    assert not any(call.guard for call in program.calls)
    assert not any(source.kind == "template" for source in sources)


def test_a_graph_without_a_choice_for_the_library_is_lowered_as_ever() -> None:
    graph = PAIR.graph
    assert lower_graph(graph, H100, cutting=told())[0] == lower_graph(graph, H100)[0]


def test_a_deterministic_program_asks_no_tuner() -> None:
    graph = alone(RESIDUAL)
    every = told(1, 16, 32, 64, 128)
    program, _, _ = lower_graph(graph, H100, deterministic=True, cutting=every)
    assert [call.kind for call in program.calls] == ["template"]


def test_a_product_that_no_library_takes_stays_a_templates(monkeypatch) -> None:
    monkeypatch.setattr("tilewright.codegen.triton.unfused.takes", lambda node: False)
    (node,) = alone(GATED).outputs
    assert unfused(node, H100) is None and Unfused.of(node) is not None
    program, _, _ = lower_graph(alone(GATED), H100, cutting=told(1, 16, 32, 64, 128))
    assert [call.kind for call in program.calls] == ["template"]


def test_other_nodes_have_no_parts() -> None:
    x = tensor("x", DType.F32, B, 8)
    body = Graph("b", (x,), (make("relu", x),))
    assert Unfused.of(make("fused", x, body=body, kind="elementwise")) is None
    assert Unfused.of(make("relu", x)) is None


PAIR = Pair(
    Form(k=32, n=128, dtype=DType.BF16, behind=("residual",)),
    Form(k=128, n=24, dtype=DType.BF16, norm="weight"),
)
EVERY = (1, 16, 32, 64, 128)


@pytest.mark.parametrize("only", ["", "first_body", "second_body"])
@pytest.mark.parametrize("tokens", [1, 2, 64, 65])
def test_where_something_is_handed_on_both_products_stay_ours(only: str, tokens: int) -> None:
    """A library may have one token and more than 64, for either product or both."""
    cutting = told(*EVERY, only=only)
    program, _, _ = lower_graph(PAIR.graph, H100, cutting=cutting)
    made = program.at({"B": tokens})
    handed = [call for call in made.calls if hands_on(call)]
    if 1 < tokens <= 64:
        assert [call.kind for call in made.calls] == ["template", "template"]
        (first,) = handed
        assert made.calls[1].operands[-2:] == first.results[1:]
    else:
        assert not handed
        assert [call.kind for call in made.calls].count("library") == (2 if not only else 1)
    check(PAIR.graph, cutting, tokens)


@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_what_a_call_reads_is_written_wherever_it_is_made(tokens: int) -> None:
    for only in ("", "first_body", "second_body"):
        program, _, _ = lower_graph(PAIR.graph, H100, cutting=told(*EVERY, only=only))
        there = {*program.inputs, *program.weights}
        for call in program.at({"B": tokens}).calls:
            assert {name for name in call.operands if name is not None} <= there
            there |= {*call.results}


def test_a_library_below_what_is_handed_on_changes_nothing_there() -> None:
    graph = PAIR.graph
    program, _, _ = lower_graph(graph, H100, cutting=told(16, 32, 64))
    assert program == lower_graph(graph, H100)[0]


def test_products_that_are_alike_have_parts_of_their_own() -> None:
    """Two products of one normed x: the norm's nodes are one, and each has its own buffer."""
    x = tensor("x", DType.BF16, B, GATED.k)
    scale = product_of("one", GATED, x).operands[1]
    second = product_of("two", GATED, x)
    operands = [scale if n.shape == scale.shape else n for n in second.operands]
    graph = graph_of(product_of("one", GATED, x), make("fused", *operands, **dict(second.attrs)))
    program, _, _ = lower_graph(graph, H100, cutting=told(128))
    for tokens in (8, 100):
        made = program.at({"B": tokens})
        writers = [name for call in made.calls for name in call.results]
        assert len(set(writers)) == len(writers) == (2 if tokens == 8 else 6)
    check(graph, told(128), 70)


def test_reports_know_what_each_call_computes() -> None:
    graph = parse_graph(str(alone(GATED)))
    program, _, _ = lower_graph(graph, H100, cutting=told(128))
    (node,) = graph.outputs
    many = program.at({"B": 100})
    ops = [[n.op for n in nodes] for nodes in nodes_of_calls(graph, many)]
    assert ops == [["fused"], ["linear"], ["fused"]]
    assert all(owners == (node,) for owners in owners_of_calls(graph, many))
    assert nodes_of_calls(graph, program.at({"B": 10})) == [(node,)]


def test_memory_is_planned_for_both_sides() -> None:
    program, _, _ = lower_graph(alone(GATED), H100, cutting=told(128))
    sizes: Mapping[str, int] = {"B": 100}
    whole, many = plan_buffers(program, sizes), plan_buffers(program.at(sizes), sizes)
    assert {p.buffer for p in many.temporaries} == {p.buffer for p in whole.temporaries}
    assert whole.peak == many.peak > 0
    assert plan_buffers(program.at({"B": 8}), {"B": 8}).peak == 0


def test_calls_of_both_sides_compile_ahead_of_time() -> None:
    _, sources, _ = lower_graph(alone(GATED), H100, cutting=told(128))
    assert len(compile_sources(list(sources), H100.arch)) == len(sources) == 3

"""Rows that are picked before they are computed."""

from __future__ import annotations

import pytest
import torch

from rewriting import parse
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph
from tilewright.ir.verifier import verify
from tilewright.passes.pick_rows import pick_rows

SIGNATURE = "def g(x: f32[T, 8], ids: i64[T], wanted: i64[R]):"
BEFORE = """
{signature}
    a: f32[8, 8] = param("a")
    b: f32[16, 8] = param("b")
    s: f32[T, 8] = silu(x)
    y: f32[T, 8] = linear(s, a)
    z: f32[T, 8] = add(x, y)
    heads: f32[T, 2, 4] = reshape(z, shape=(T, 2, 4))
    top: f32[T, 2, 4] = softmax(heads, dim=2)
    flat: f32[T, 8] = reshape(top, shape=(T, 8))
    logits: f32[T, 16] = linear(flat, b)
    rows: f32[R, 16] = index_select(logits, wanted, dim=0)
    return {{"rows": rows{more}}}
"""
AFTER = """
def g(x: f32[T, 8], ids: i64[T], wanted: i64[R]):
    a: f32[8, 8] = param("a")
    b: f32[16, 8] = param("b")
    x_rows: f32[R, 8] = index_select(x, wanted, dim=0)
    s: f32[R, 8] = silu(x_rows)
    y: f32[R, 8] = linear(s, a)
    z: f32[R, 8] = add(x_rows, y)
    heads: f32[R, 2, 4] = reshape(z, shape=(R, 2, 4))
    top: f32[R, 2, 4] = softmax(heads, dim=2)
    flat: f32[R, 8] = reshape(top, shape=(R, 8))
    logits: f32[R, 16] = linear(flat, b)
    return {"rows": logits}
"""


def moved(text: str) -> tuple[Graph, Graph]:
    graph = parse(text)
    after = pick_rows(graph, graph.outputs[0])
    verify(after)
    return graph, after


def with_output(more: str = "") -> str:
    return BEFORE.format(signature=SIGNATURE, more=more)


@pytest.mark.quick
def test_everything_behind_the_inputs_moves() -> None:
    _, after = moved(with_output())
    assert after == parse_graph(AFTER)


def test_the_numbers_stay() -> None:
    before, after = moved(with_output())
    inputs = [torch.randn(5, 8), torch.arange(5), torch.tensor([4, 0, 4])]
    torch.testing.assert_close(interpret(after, inputs), interpret(before, inputs))


@pytest.mark.parametrize("kept, picked", [("y", {"x", "y"}), ("flat", {"flat"}), ("s", {"x", "s"})])
def test_rows_that_somebody_else_reads_stay(kept: str, picked: set[str]) -> None:
    before, after = moved(with_output(f', "also": {kept}'))
    names = {node: name for name, node in _named(before).items()}
    picks = [n for n in after.nodes if n.op == "index_select"]
    assert {names.get(n.operands[0], "x") for n in picks} == picked
    inputs = [torch.randn(5, 8), torch.arange(5), torch.tensor([1, 3])]
    torch.testing.assert_close(interpret(after, inputs), interpret(before, inputs))


def _named(graph: Graph) -> dict[str, object]:
    by_op = {"silu": "s", "add": "z", "softmax": "top"}
    found = {by_op[n.op]: n for n in graph.nodes if n.op in by_op}
    found["flat"] = next(n for n in graph.nodes if n.op == "reshape" and n.type.rank == 2)
    found["y"] = next(n for n in graph.nodes if n.op == "linear" and n.shape[1] == 8)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "x2: f32[T, 8] = embedding(table, ids)",  # a pick of its own
        "m: f32[1, 8] = amax(x, dims=(0,), keepdim=True)\n    x2: f32[T, 8] = sub(x, m)",
    ],
)
def test_what_is_not_of_rows_alone_stays(line: str) -> None:
    text = f"""
{SIGNATURE}
    table: f32[32, 8] = param("table")
    {line}
    rows: f32[R, 8] = index_select(x2, wanted, dim=0)
    return {{"rows": rows}}
"""
    before, after = moved(text)
    inputs = [torch.randn(5, 8), torch.arange(5), torch.tensor([1, 3])]
    (ours,), (expected,) = interpret(after, inputs), interpret(before, inputs)
    assert torch.equal(ours, expected)
    assert "embedding" not in line or after == before

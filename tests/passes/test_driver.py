"""The driver: wrong passes are caught and named, the limit stops, dumps are written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rewriting import parse
from tilewright.errors import VerificationError
from tilewright.ir.build import const, input_node, make
from tilewright.ir.graph import Graph
from tilewright.passes.base import Pass
from tilewright.passes.canonicalize import CANONICALIZE
from tilewright.passes.driver import largest_error, run_passes
from tilewright.passes.pipeline import pipeline

TEXT = """
def g(x: f32[T, 4]):
    a: f32[T, 4] = mul(x, f32(1.0))
    y: f32[T, 4] = exp(a)
    return {"y": y}
"""


def _halved(graph: Graph) -> Graph:
    return graph.with_outputs((make("mul", graph.outputs[0], const(0.5, graph.outputs[0].dtype)),))


def _foreign_input(graph: Graph) -> Graph:
    stranger = input_node("stranger", graph.outputs[0].type)
    return graph.with_outputs((make("add", graph.outputs[0], stranger),))


def _renamed(graph: Graph) -> Graph:
    return replace(graph, output_names=("y", "z"))


@pytest.mark.quick
def test_a_pass_that_changes_numbers_is_named() -> None:
    with pytest.raises(VerificationError, match="pass halve") as caught:
        run_passes(parse(TEXT), [Pass("halve", _halved)], level="full", samples=[torch.ones(3, 4)])
    assert caught.value.exit_code == 1


@pytest.mark.quick
@pytest.mark.parametrize("wrong", [_foreign_input, _renamed])
def test_a_pass_that_breaks_the_graph_is_named(wrong) -> None:
    with pytest.raises(VerificationError, match="pass break"):
        run_passes(parse(TEXT), [Pass("break", wrong)], level="structure")


def test_off_looks_at_nothing() -> None:
    graph, _ = run_passes(parse(TEXT), [Pass("break", _renamed)], level="off")
    assert graph.output_names == ("y", "z")


def test_records_say_what_each_pass_did() -> None:
    seen = []
    graph, records = run_passes(
        parse(TEXT),
        [CANONICALIZE, CANONICALIZE],
        level="full",
        samples=[torch.ones(3, 4)],
        observe=seen.append,
    )
    assert records == seen and [r.name for r in records] == ["canonicalize"] * 2
    assert records[0].nodes_after < records[0].nodes_before
    assert records[1].nodes_after == records[1].nodes_before and records[1].max_error == 0.0
    assert records[-1].graph is graph


def test_the_limit_stops_before_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_PASS_LIMIT", "1")
    _, records = run_passes(parse(TEXT), [CANONICALIZE, Pass("halve", _halved)])
    assert [record.name for record in records] == ["canonicalize"]


def test_dumps_are_graph_text(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TILEWRIGHT_DUMP", str(tmp_path / "dump"))
    graph, _ = run_passes(parse(TEXT), [CANONICALIZE])
    assert (tmp_path / "dump" / "000-canonicalize.txt").read_text() == str(graph)


def test_debug_prints_passes_and_times(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("TILEWRIGHT_DEBUG", "1")
    run_passes(parse(TEXT), [CANONICALIZE])
    assert "pass canonicalize: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (torch.full((2,), 1.1), "0.1"),
        (torch.ones(3), "[3]"),
        (torch.ones(2).double(), "float64"),
        (torch.tensor([1.0, torch.nan]), "NaN"),
    ],
)
def test_deviations_are_refused(found: torch.Tensor, what: str) -> None:
    with pytest.raises(VerificationError) as caught:
        largest_error("here", [torch.ones(2)], [found])
    assert what in str(caught.value)


def test_the_order_of_the_pipeline() -> None:
    """The golden order: recognise, then insert the cache, then merge, then fuse."""
    names = [step.name for step in pipeline("paged", fuses=True)]
    assert names.index("recognize_attention") < names.index("paged-cache")
    assert names.index("paged-cache") < names.index("merge_projections") < names.index("fuse")
    assert names.index("fuse-append") == names.index("open_rows") - 1 == names.index("fuse") - 2
    assert "paged-cache" not in [step.name for step in pipeline(None)]
    assert "fuse" not in [step.name for step in pipeline("slot")]
    assert "fuse-append" not in [step.name for step in pipeline("slot", fuses=True)]

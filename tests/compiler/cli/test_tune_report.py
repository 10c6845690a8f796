"""``tilewright tune report``: tables, JSON, one page that fetches nothing, and misuse."""

from __future__ import annotations

import json
import re
import xml.dom.minidom
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cli_running import refused, run
from fake_kernels import FakeTunable, InProcess, config
from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.pool import Pool
from tilewright.autotune.search import tune
from tilewright.autotune.study_report import read_studies
from tilewright.compiler.tune_report.charts import Scale, history_chart, prediction_chart

EVIL = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies: one with faults, one of few trials whose name is hostile."""
    path = tmp_path_factory.mktemp("report") / "study.log"
    faults = {config(64, 64, 2): "wrong", config(32, 64, 2): "spill"}
    for tunable, trials in ((FakeTunable(faults), 24), (FakeTunable(name=EVIL), 4)):
        effort = replace(EFFORTS["quick"], share=1.0, trials=trials)
        with Pool(start=InProcess) as pool:
            tune(tunable, effort, pool, storage=path)
    return path


def test_the_tables_have_what_a_reader_looks_for(journal) -> None:
    result = run("tune", "report", "--storage", journal)
    assert result.exit_code == 0, result.output
    for part in (
        "24 of 90 valid configs tried",
        "its error is 50 times the tolerance",
        "spills 96 bytes a thread",
        "too few trials",
        "rank correlation",
        "best by trial 0: 1.000",
    ):
        assert part in result.stdout, part


def test_json_is_the_same_figures(journal) -> None:
    result = run("tune", "report", "--storage", journal, "--json")
    found = json.loads(result.stdout)
    assert [one["name"] for one in found] == [one.name for one in read_studies(journal)]
    full = next(one for one in found if len(one["tried"]) == 24)
    assert full["failed"].keys() == {"wrong", "refused"} and full["coverage"]["valid"] == 90


class Fetches(HTMLParser):
    """All that a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        if tag in ("script", "link", "img", "iframe", "object"):
            self.found.append(tag)
        self.found += [v for n, v in attrs if n in ("src", "href") and not v.startswith("#")]


def test_the_page_is_one_file_that_fetches_nothing(journal, tmp_path) -> None:
    path = tmp_path / "report.html"
    result = run("tune", "report", "--storage", journal, "--html", path)
    assert result.exit_code == 0, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    parser = Fetches()
    parser.feed(text)
    assert parser.found == [] and "default-src 'none'" in text
    assert EVIL not in text and "alert(1)" in text  # as text
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) >= 4
    for drawing in drawings:
        xml.dom.minidom.parseString(drawing)


def test_marks_lie_where_their_figures_say(journal) -> None:
    report = next(one for one in read_studies(journal) if len(one.tried) == 24)
    chart = history_chart(report)
    assert len(chart.marks) == 22 and len(chart.line) == 2 * len(report.history)
    lowest = max(chart.marks, key=lambda mark: mark.y)  # pixels grow downwards
    assert lowest.title.startswith(f"trial {report.best.number}:") and lowest.kind == "best"
    assert len(prediction_chart(report).marks) == 22
    scale = Scale([1.0, 100.0], (0.0, 100.0), log=True)
    assert scale(10.0) == pytest.approx(50.0)
    assert Scale([3.0], (0.0, 10.0), log=False)(3.0) == pytest.approx(5.0)
    assert Scale([0.0, 10.0], (0.0, 10.0), log=False).ticks() == [0.0, 5.0, 10.0]


def test_misuse_is_refused_before_anything_is_written(journal, tmp_path) -> None:
    refused(run("tune", "report", "--storage", tmp_path / "no"), "no file", "--storage")
    refused(run("tune", "report", "--storage", tmp_path), "Is a directory")
    refused(run("tune", "report", "--storage", journal, "--html", tmp_path), "--html", "a folder")
    there = tmp_path / "no" / "report.html"
    refused(run("tune", "report", "--storage", journal, "--html", there), "no folder")
    assert run("tune", "report").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_said(journal, tmp_path, monkeypatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tilewright.formats.atomic.write_atomic", full)
    result = run("tune", "report", "--storage", journal, "--html", tmp_path / "r.html")
    refused(result, "--html", "No space left on device")

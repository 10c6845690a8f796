"""A whole comparison: what may be asked for together, whose code gives the other side, merging."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from regress_suites import GRAPH, HEAD, LLAMA, kernel, snapshot, suite_of
from small_checkouts import small_checkout
from tilewright.autotune.verdicts import Interval, Verdict
from tilewright.compiler.regress import run as module
from tilewright.compiler.regress.baseline import Baseline, read_baseline, write_baseline
from tilewright.compiler.regress.merge import merged
from tilewright.compiler.regress.model import Row, Side
from tilewright.compiler.regress.run import OF_PINNED, Request, baseline_of, run_comparison
from tilewright.compiler.regress.timing.session import Timed
from tilewright.errors import EngineError, UsageError

KEY = ("norm", "h100")
NAME = "add_rms_norm_ab12"
TEXT = HEAD + GRAPH + GRAPH.replace('"norm"', '"other"')


@pytest.fixture
def suite(tmp_path):
    return suite_of(tmp_path, HEAD + GRAPH)


@pytest.fixture
def collected(suite, monkeypatch):
    """What is collected, in place of compiling; counts how often."""
    found = {KEY: snapshot(suite.cases[0].definition, kernel(NAME))}
    calls = []
    monkeypatch.setattr(module, "collect", lambda *args: calls.append(1) or dict(found))
    return calls, found


@pytest.fixture
def baseline(tmp_path, suite, collected):
    write_baseline(tmp_path / "base", suite, collected[1], "first")
    return tmp_path / "base"


def timed(verdict=Verdict.NO_CHANGE, value=1.0, device="H100"):
    ratio = Interval(value, value - 0.01, value + 0.01)
    names = ("tiny", "h100", "add", "time (decode b1)", "kernels", "s", "lower")
    row = Row(3, *names, 1e-3, value * 1e-3, "3%", verdict, ratio, "measured")
    return Timed((row,), device, {"torch": "2", "cuda": "13"}, {}, 1.0)


@pytest.fixture
def checkouts(tmp_path):
    return [small_checkout(tmp_path / name) for name in ("old", "pinned")]


@pytest.mark.quick
def test_options_that_do_not_go_together(tmp_path, suite, checkouts, collected):
    old, pinned = checkouts
    folder = tmp_path / "base"
    for wrong, said in (
        (Request(suite, gpu=True), "--gpu: .*--old CHECKOUT or --pinned CHECKOUT, found neither"),
        (Request(suite, folder, gpu=True), "git worktree add"),
        (Request(suite, folder, None, pinned), "--pinned: .*found no --gpu"),
        # Else the checkout would be left out in silence, and the comparison pass without it.
        (Request(suite, folder, old), "--old: .*found --baseline, and no --gpu"),
        *((Request(suite, budget=n), "--budget: .*0 seconds") for n in (0, -1, float("nan"))),
    ):
        with pytest.raises(UsageError, match=said):
            run_comparison(wrong)
    assert collected[0] == []


def test_a_baseline_is_compared_with(suite, baseline, collected):
    said = []
    outcome = run_comparison(Request(suite, baseline), lambda phase, share: said.append(phase))
    found = outcome.comparison
    assert {row.verdict for row in found.rows} == {Verdict.NO_CHANGE}
    assert (found.old.reason, found.exit_code, found.new.device) == ("first", 0, None)
    assert outcome.timed is outcome.against_pinned is None
    assert outcome.snapshots == collected[1] and found.seconds > 0


def test_no_baseline_is_never_a_pass(tmp_path, suite, collected):
    for request in (Request(suite, tmp_path / "none"), Request(suite)):
        found = run_comparison(request).comparison
        assert [row.verdict for row in found.rows] == [Verdict.MISSING]
        assert found.exit_code == 1 and "record one with" in found.rows[0].note


def test_what_is_refused_is_refused_before_collecting(suite, baseline, collected, monkeypatch):
    real = read_baseline(baseline)
    versions = {**real.side.versions, "triton": "0.1"}
    other = replace(real, side=replace(real.side, versions=versions))
    monkeypatch.setattr(module, "read_baseline", lambda folder: other)
    with pytest.raises(UsageError, match="triton 0.1 against"):
        run_comparison(Request(suite, baseline))
    monkeypatch.undo()
    (baseline / "norm.h100.json").write_text("{}")
    with pytest.raises(UsageError, match=r"norm.h100.json.*version control"):
        run_comparison(Request(suite, baseline))
    assert collected[0] == []


def test_a_gpu_that_is_not_there_is_missed_before_collecting(suite, checkouts, collected):
    with pytest.raises(UsageError, match="CUDA device"):
        run_comparison(Request(suite, old=checkouts[0], gpu=True))
    assert collected[0] == []


def test_without_a_baseline_the_old_code_records_one(suite, checkouts, collected, monkeypatch):
    asked = []

    def baseline_of(checkout, suite, only, folder):
        asked.append((checkout, suite.name, only, folder.name, folder.parent.is_dir()))
        old = {KEY: snapshot(suite.cases[0].definition, kernel(NAME, digest="2" * 64))}
        side = Side("abc", "abcdef", "now", None, old[KEY].versions)
        return Baseline(side, suite.name, suite.digest, old)

    monkeypatch.setattr(module, "baseline_of", baseline_of)
    request = Request(suite, None, checkouts[0], only=["norm"], expect_identical=True)
    found = run_comparison(request).comparison
    assert asked == [(checkouts[0], "small", ["norm"], "baseline", True)]
    assert found.old.commit == "abcdef" and found.exit_code == 1
    assert [row.subject for row in found.of(Verdict.REGRESSION)] == ["add_rms_norm", "program"]


def test_the_old_code_is_run_with_its_own_words(tmp_path, suite, collected, monkeypatch):
    ran = []
    recording = (
        "import sys\nsys.exit('no\\nerror: it is broken\\nexpected: e\\nfound: f\\nremedy: r')\n"
    )
    with pytest.raises(EngineError, match="the code in .*bad.*error: it is broken expected: e"):
        bad = small_checkout(tmp_path / "bad", __main__=recording)
        baseline_of(bad, suite, None, tmp_path / "b")

    def run_in(checkout, name, words):
        ran.append((name, words))
        write_baseline(Path(words[words.index("--baseline") + 1]), suite, collected[1], "r")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module, "run_in", run_in)
    found = baseline_of(small_checkout(tmp_path / "old"), suite, ["norm"], tmp_path / "b")
    assert found.snapshots == collected[1]
    assert (found.side.label, found.side.reason) == (str(tmp_path / "old"), None)
    name, words = ran[0]
    assert name == "__main__" and words[:3] == ["regress", "record", str(suite.path.resolve())]
    assert words[words.index("--only") + 1] == "norm" and "--reason" in words
    monkeypatch.setattr(module, "run_in", lambda *_: SimpleNamespace(returncode=0))
    assert baseline_of(small_checkout(tmp_path / "old"), suite, None, tmp_path / "none") is None


def test_what_is_timed_stands_beside_the_rest(suite, baseline, checkouts, collected, monkeypatch):
    results = [timed(Verdict.REGRESSION, 1.1), timed(Verdict.UNDECIDABLE, 1.02)]
    asked = []

    def time_suite(suite, old, new, *, only, budget, advance):
        asked.append((old, only, budget))
        advance("half", 0.5)
        return results[len(asked) - 1]

    monkeypatch.setattr(module, "time_suite", time_suite)
    monkeypatch.setattr(module, "timed_cases", lambda suite, only: None)
    said = []
    old, pinned = checkouts
    request = Request(suite, baseline, old, pinned, ["norm"], gpu=True, budget=30)
    outcome = run_comparison(request, lambda *at: said.append(at))
    assert asked == [(old, ["norm"], 30), (pinned, ["norm"], 30)]
    assert (outcome.timed, outcome.against_pinned) == tuple(results)
    found = outcome.comparison
    assert (found.new.device, found.new.versions["cuda"]) == ("H100", "13")
    assert found.new.versions["torch"] == collected[1][KEY].versions["torch"]
    one, two = [row for row in found.rows if row.tier == 3]
    assert (one.note, two.note) == ("measured", f"{OF_PINNED}. measured")
    assert found.findings == (one,) and ("half", 0.7) in said
    asked.clear()
    strict = run_comparison(replace(request, strict=True)).comparison
    assert [row.verdict for row in strict.findings] == [Verdict.REGRESSION, Verdict.UNDECIDABLE]


@pytest.fixture
def two(tmp_path):
    suite = suite_of(tmp_path, TEXT)
    definition = suite.cases[0].definition
    found = {(c.name, "h100"): snapshot(definition, kernel(NAME), case=c.name) for c in suite.cases}
    write_baseline(tmp_path / "base", suite, found, "both")
    return suite, read_baseline(tmp_path / "base")


def test_a_part_that_is_recorded_anew_lies_beside_the_rest(two):
    suite, old = two
    new = {KEY: snapshot(suite.cases[0].definition, kernel(NAME, digest="3" * 64))}
    written, both = merged(suite, old, new, ["norm"])
    assert written.cases == suite.cases
    assert both == {KEY: new[KEY], ("other", "h100"): old.snapshots["other", "h100"]}
    assert merged(suite, old, new, None) == (suite, new)
    written, both = merged(suite, None, new, ["norm"])
    assert [case.name for case in written.cases] == ["norm"] and both == new
    gone = replace(suite, cases=suite.cases[:1])
    assert merged(gone, old, new, ["norm"])[1] == new  # the suite no longer has the other
    more = suite_of(suite.path.parent, TEXT + LLAMA)
    assert [case.name for case in merged(more, old, new, ["norm"])[0].cases] == ["norm", "other"]


def test_cases_of_other_versions_cannot_stay(two):
    suite, old = two
    other = replace(old, side=replace(old.side, versions={**old.side.versions, "torch": "1.0"}))
    with pytest.raises(UsageError, match="torch 1.0 against.*Record all of it"):
        merged(suite, other, {}, ["norm"])
    assert merged(suite, other, {}, None)[1] == {}

"""Bisection over throw-away repositories: the search against brute force, commits of made-up
figures, and once the package itself with a pass that a commit drops.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilewright
from bisect_repositories import (
    LAUNCHES,
    assert_clean,
    bisected,
    committed,
    git,
    plain_git,
    repository,
    suite,
    value_at,
)
from comparisons import row
from regress_suites import GRAPH, HEAD, LLAMA, kernel, snapshot, suite_of
from tilewright.autotune.verdicts import Interval, Verdict
from tilewright.compiler.regress import single
from tilewright.compiler.regress.baseline import Baseline
from tilewright.compiler.regress.bisect import (
    bisect_series,
    render_culprit,
    search,
)
from tilewright.compiler.regress.model import Side
from tilewright.compiler.regress.single import record_case, write_suite
from tilewright.compiler.regress.suite import load_suite
from tilewright.compiler.regress.timing.session import Timed
from tilewright.compiler.regress.worktrees import Repository
from tilewright.errors import EngineError, UsageError
from tilewright.passes.pipeline import pipeline as pipeline_of

__all__ = ["plain_git", "suite"]  # fixtures
TIME = "norm.h100/decode step/itl (b1)"


# The search.


@pytest.mark.quick
@given(st.lists(st.booleans(), max_size=40), st.data())
def test_search_against_brute_force(unknown, data):
    """Good up to somewhere, bad from there; some cannot be told."""
    first = data.draw(st.integers(0, len(unknown)))
    asked = []

    def is_bad(index):
        asked.append(index)
        return None if unknown[index] else index >= first

    count = len(unknown) + 1  # the last is known to be bad
    low, high = search(count, is_bad)
    assert low == max((i for i in range(first) if not unknown[i]), default=-1)
    assert high == min((i for i in range(first, count - 1) if not unknown[i]), default=count - 1)
    assert len(set(asked)) == len(asked)
    told = [i for i in asked if not unknown[i]]
    assert len(told) <= math.ceil(math.log2(count))


@given(st.lists(st.sampled_from([True, False, None]), max_size=25))
def test_search_ends_at_a_step_whatever_the_history(answers):
    """Where a series got worse, better and worse again, one of the steps is found."""
    whole = [*answers, True]
    low, high = search(len(whole), whole.__getitem__)
    assert low == -1 or whole[low] is False
    assert whole[high] is True
    assert all(whole[i] is None for i in range(low + 1, high))


# Commits.


@pytest.mark.quick
def test_names_the_commit_and_leaves_the_user_alone(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5, 5, 5, 7, 7, 7)
    (folder / "value.json").write_text("half-written")
    (folder / "new.txt").write_text("mine")
    (folder / "staged.txt").write_text("mine too")
    git(folder, "add", "staged.txt")
    status, index = git(folder, "status", "--porcelain"), (folder / ".git/index").read_bytes()
    told = []
    found = bisected(
        folder, suite, commits[0], "main", advance=lambda phase, share: told.append(share)
    )
    assert found.commit == commits[3]
    assert (found.subject, found.author) == ("number 3", "Ada")
    assert found.date.startswith("2026-01-02T03:04:05")
    assert found.candidates == (commits[3],)
    values = dict(zip(commits, (5, 5, 5, 7, 7, 7), strict=True))
    assert [c for c, _ in found.values] == [c for c in commits if c in dict(found.values)]
    assert all(value == values[commit] for commit, value in found.values)
    assert len(found.values) <= 2 + math.ceil(math.log2(5))
    assert told == sorted(told) and max(told) <= 1
    assert git(folder, "status", "--porcelain") == status
    assert (folder / ".git/index").read_bytes() == index
    assert (folder / "value.json").read_text() == "half-written"
    assert_clean(folder)


def test_commits_that_do_not_compile_are_passed_over(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5, None, 5, 7, None, 7)
    assert bisected(folder, suite, commits[0], "main").commit == commits[3]


def test_all_are_named_where_neighbours_do_not_compile(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5, 5, None, None, 7, 7)
    found = bisected(folder, suite, commits[0], "main")
    assert found.commit == commits[4]
    assert found.candidates == tuple(commits[2:5])
    assert dict(found.skipped) == {c: "the code: no compiler" for c in commits[2:4]}
    assert dict(found.values)[commits[2]] is None
    text = render_culprit(found)
    assert f"or one of {commits[2][:12]}, {commits[3][:12]}" in text
    assert "skipped: the code: no compiler" in text and "← the culprit" not in text


def test_a_commit_without_regress_is_passed_over(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5)
    shutil.move(folder / "compiler", folder / "elsewhere")
    commits.append(committed(folder, "no regress", 5))
    shutil.move(folder / "elsewhere", folder / "compiler")
    commits.append(committed(folder, "back", 7))
    found = bisected(folder, suite, commits[0], "main")
    assert found.candidates == (commits[1], commits[2])
    assert "no compiler/regress" in found.skipped[0][1]


def test_within_the_gate_is_good(tmp_path, suite):
    """10 % more registers are allowed: the step that crosses that is found, not the first one."""
    folder, commits = repository(tmp_path / "repo", 100, 104, 108, 112, 116)

    def registers(checkout, suite):
        series = {"registers": value_at(checkout), "spills": 0}
        return snapshot(suite.cases[0].definition, kernel(series=series))

    series = "norm.h100/add/registers"
    found = bisected(folder, suite, commits[0], "main", series, recorder=registers)
    assert found.commit == commits[3]


def test_a_merge_is_one_step(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5)
    git(folder, "checkout", "-q", "-b", "side")
    side = [committed(folder, f"side {i}", 7) for i in range(3)]
    git(folder, "checkout", "-q", "main")
    git(folder, "merge", "-q", "--no-ff", "-m", "Merge side", "side")
    commits.append(git(folder, "rev-parse", "HEAD"))
    committed(folder, "after", 7)
    found = bisected(folder, suite, commits[0], "main")
    assert (found.commit, found.subject) == (commits[1], "Merge side")
    with pytest.raises(UsageError, match=f"merged into it.*Name {commits[0][:12]}"):
        bisected(folder, suite, side[1], "main")


def test_source_and_watched_can_be_bisected(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5, 5, 6, 6)
    found = bisected(folder, suite, commits[0], "main", "norm.h100/add/source")
    assert found.commit == commits[2]
    assert [value for _, value in found.values][-1] == 1

    def renamed(checkout, suite):
        name = "add_rms_norm_12ab" if value_at(checkout) == 5 else "other_12ab"
        return snapshot(suite.cases[0].definition, kernel(name))

    series = "norm.h100/add_rms_norm/watched"
    assert (
        bisected(folder, suite, commits[0], "main", series, recorder=renamed).commit == (commits[2])
    )


# What is refused.


def test_wrong_ends_are_refused_with_both_values(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5, 5, None)
    with pytest.raises(UsageError, match=r"5 and 5, where \+0 is allowed"):
        bisected(folder, suite, commits[0], commits[1])
    with pytest.raises(UsageError, match=r"5 and none \(the code: no compiler\)"):
        bisected(folder, suite, commits[0], commits[2])
    committed(folder, "better", 4)
    with pytest.raises(UsageError, match="5 and 4"):
        bisected(folder, suite, commits[0], "main")
    with pytest.raises(UsageError, match=f"good commit {commits[2][:12]}.*no compiler"):
        bisected(folder, suite, commits[2], "main")
    assert_clean(folder)


def test_wrong_revisions_are_refused(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5, 5, 7)
    for name in ("nowhere", "--all", "0" * 40, f"{commits[0]}:value.json"):
        with pytest.raises(UsageError, match=f"revision '{name}'"):
            bisected(folder, suite, name, "main")
        with pytest.raises(UsageError, match=f"revision '{name}'"):
            bisected(folder, suite, "main", name)
    with pytest.raises(UsageError, match="which is none"):
        bisected(folder, suite, "main", commits[0])
    with pytest.raises(UsageError, match="twice"):
        bisected(folder, suite, "main", commits[2])
    with pytest.raises(UsageError, match="git repository"):
        bisected(tmp_path, suite, "main", commits[0])


def test_unknown_series_list_near_ones(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5, 7)
    with pytest.raises(UsageError, match="norm.h100/call/launches.*no call/launchs there"):
        bisected(folder, suite, commits[0], "main", "norm.h100/call/launchs")
    with pytest.raises(UsageError, match="such as norm.h100.*no norm.a100 there"):
        bisected(folder, suite, commits[0], "main", "norm.a100/call/launches")
    for series in ("norm.h100", "norm.h100/call"):
        with pytest.raises(UsageError, match="CASE.TARGET/SUBJECT/SERIES"):
            bisected(folder, suite, commits[0], "main", series)


# Timed series.


def timer_of(verdicts=None):
    """Times by the commits' values: a verdict from a table, or by the ratio."""

    def timer(suite, old, new, *, budget):
        assert suite.cases[0].name == "norm"
        before, after = value_at(old), value_at(new)
        if after is None:
            raise EngineError("case norm", expected="a", found="no engine", remedy="b")
        verdict = (verdicts or {}).get(after)
        verdict = verdict or (Verdict.REGRESSION if after > before else Verdict.NO_CHANGE)
        ratio = Interval(after / before, 0.9, 1.1)
        subject, series = TIME.split("/")[1:]
        found = row(
            verdict,
            tier=3,
            case="norm",
            subject=subject,
            series=series,
            old=before,
            new=after,
            ratio=ratio,
        )
        return Timed((found,), "h100", {}, {}, 1.0)

    return timer


def alike(checkout, suite):
    return snapshot(suite.cases[0].definition, kernel())


def test_timed_series_go_by_the_verdict(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 100, 99, None, 101, 105, 105)
    timer = timer_of({99: Verdict.IMPROVEMENT, 101: Verdict.NO_CHANGE})
    found = bisected(folder, suite, commits[0], "main", TIME, timer=timer, recorder=alike)
    assert found.commit == commits[4]
    assert dict(found.values)[commits[4]] == pytest.approx(1.05)
    assert found.values[0] == (commits[0], 1.0)
    assert found.stage == "runtime" and not found.kernels
    assert "1.05 × good" in render_culprit(found) and "the runtime" in render_culprit(found)


def test_noise_that_decides_nothing_is_said(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 100, 101, 105)
    timer = timer_of({101: Verdict.UNDECIDABLE})
    with pytest.raises(UsageError, match=f"{commits[1][:12]}.*none in 7 s.*--budget"):
        bisected(folder, suite, commits[0], "main", TIME, timer=timer, budget=7.0)
    with pytest.raises(UsageError, match="1 × good and 1.05 × good"):
        timer = timer_of({105: Verdict.NO_CHANGE})
        bisected(folder, suite, commits[0], "main", TIME, timer=timer)
    assert_clean(folder)


def test_a_timed_commit_is_named_though_its_code_cannot_be_recorded(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 100, 105)

    def broken(checkout, suite):
        raise EngineError("the code", expected="a", found="no disassembler", remedy="b")

    found = bisected(folder, suite, commits[0], "main", TIME, timer=timer_of(), recorder=broken)
    assert (found.commit, found.stage) == (commits[1], "unknown")
    assert "no disassembler" in render_culprit(found)


def test_any_series_can_be_timed_and_unknown_ones_are_named(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 100, 105)
    with pytest.raises(UsageError, match=r"decode step/itl \(b1\)"):
        bisected(folder, suite, commits[0], "main", LAUNCHES, timed=True, timer=timer_of())


# The real thing.


def test_cases_written_for_older_code_are_the_same_cases(tmp_path):
    """Thresholds, owners and what is watched stay behind; relative names go on to work."""
    text = HEAD + '[thresholds]\n"*/launches" = "5%"\n' + LLAMA + GRAPH
    text = text.replace(
        'model_type = "llama"', 'model_type = "llama"\nnote = "🧨 \\u007f \\\\ \\""'
    )
    suite = suite_of(tmp_path, text)
    (tmp_path / "copy").mkdir()
    copied = load_suite(write_suite(suite, tmp_path / "copy"))
    assert [c.definition for c in copied.cases] == [c.definition for c in suite.cases]
    assert [(c.name, c.targets) for c in copied.cases] == [(c.name, c.targets) for c in suite.cases]
    assert not copied.thresholds and not any(case.watch for case in copied.cases)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    text = HEAD + '[[model]]\nname = "m"\ntargets = ["h100"]\npath = "model"\npage_size = 32\n'
    suite = suite_of(tmp_path, text)
    copied = load_suite(write_suite(suite, tmp_path / "copy"))
    assert [c.definition for c in copied.cases] == [c.definition for c in suite.cases]


def test_a_snapshot_by_other_code_is_refused(tmp_path, suite, monkeypatch):
    """A process that did not run the checkout's code, or wrote what we cannot read."""
    folder, commits = repository(tmp_path / "repo", 5)
    made = snapshot(suite.cases[0].definition, kernel())

    def recorded(commit):
        found = Baseline(Side("", commit), "small", "", {("norm", "h100"): made})
        monkeypatch.setattr(single, "baseline_of", lambda *arguments: found)
        with Repository(folder).checkout(commits[0]) as checkout:
            return record_case(checkout, suite)

    assert recorded(commits[0]) is made
    with pytest.raises(EngineError, match=f"commit {'0' * 40}"):
        recorded("0" * 40)

    def unreadable(*arguments):
        raise UsageError("baseline", expected="format 1", found="2", remedy="b")

    monkeypatch.setattr(single, "baseline_of", unreadable)
    with (
        Repository(folder).checkout(commits[0]) as checkout,
        pytest.raises(EngineError, match="format 1"),
    ):
        record_case(checkout, suite)


@pytest.mark.nightly
def test_a_dropped_pass_of_the_package_itself_is_named(tmp_path):
    """Each commit's own code compiles a small model, twice: the last commit's code is the same."""
    root, folder = Path(tilewright.__file__).parent, tmp_path / "package"
    folder.mkdir()
    for path in root.glob("*.py"):
        shutil.copy(path, folder)
    for init in root.glob("*/__init__.py"):
        package = init.parent.name
        shutil.copytree(init.parent, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    git(folder, "init", "-q", "-b", "main")
    (folder / ".gitignore").write_text("__pycache__\n")
    commits = [committed(folder, "healthy", 0)]
    pipeline = folder / "passes" / "pipeline.py"
    kept = "*((OPEN_ROWS, FUSE) if fuses else ()),"
    dropped = kept.replace(", FUSE", ",")
    assert pipeline.read_text().count(kept) == 1
    pipeline.write_text(pipeline.read_text().replace(kept, dropped))
    commits.append(committed(folder, "Drop a pass", 0))
    commits.append(committed(folder, "after", 0))
    suite = suite_of(tmp_path, HEAD + LLAMA)
    found = bisect_series(folder, suite, "tiny.h100/prefill/launches", commits[0], "main")
    assert found.commit == commits[1]
    assert (found.stage, found.pass_name, found.note) == ("pass", "fuse", "is gone")
    values = dict(found.values)
    assert values[commits[1]] == values[commits[2]] > values[commits[0]] > 0
    assert "add_rms_norm" in found.kernels
    assert any(diff.subject == "add_rms_norm" for diff in found.diffs)
    # The limit counts passes: the one that it names would be the next to run.
    assert found.pass_limit is not None
    assert pipeline_of("paged", fuses=True)[found.pass_limit].name == "fuse"
    assert_clean(folder)

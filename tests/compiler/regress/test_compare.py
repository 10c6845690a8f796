"""Comparing snapshots that are made up: every verdict, and who is named."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest

from regress_suites import GRAPH, HEAD, kernel, snapshot, suite_of
from tilewright.autotune.verdicts import Verdict
from tilewright.compiler.regress.baseline import Baseline
from tilewright.compiler.regress.collect import versions
from tilewright.compiler.regress.compare import compare_snapshots
from tilewright.compiler.regress.matching import match_kernels
from tilewright.compiler.regress.model import Side
from tilewright.compiler.regress.pass_diff import first_pass
from tilewright.errors import UsageError

KEY = ("norm", "h100")
HERE = Side("here", versions=versions())


@pytest.fixture
def suite(tmp_path):
    return suite_of(tmp_path, HEAD + GRAPH.replace('watch = ["add_rms_norm"]', 'watch = ["add"]'))


def _compare(suite, old, new, **more):
    base = Baseline(Side("base", versions=old.versions), suite.name, "", {KEY: old})
    return compare_snapshots(suite, base, {KEY: new}, new_side=HERE, **more)


def _rows(comparison, *verdicts):
    return [(row.tier, row.subject, row.series) for row in comparison.of(*verdicts)]


@pytest.mark.quick
def test_alike_is_no_change_whatever_is_expected(suite):
    one = snapshot(suite.cases[0].definition, kernel())
    for expected in (False, True):
        found = _compare(suite, one, one, expect_identical=expected)
        assert {row.verdict for row in found.rows} == {Verdict.NO_CHANGE}
        assert found.exit_code == 0
        assert found.diffs == ()
    assert {row.owner for row in found.rows} == {"kernels"}


@pytest.mark.quick
def test_a_changed_kernel_is_shown_and_only_a_refactor_may_not_have_it(suite):
    old = snapshot(suite.cases[0].definition, kernel())
    new = snapshot(old.definition, kernel(digest="2" * 64, text="# 2\nx = 3\n"))
    found = _compare(suite, old, new)
    assert found.exit_code == 0
    assert _rows(found, Verdict.CHANGED) == [(1, "program", "source"), (1, "add", "source")]
    assert "digests of kernels" in found.of(Verdict.CHANGED)[0].note
    assert [(d.subject, d.what) for d in found.diffs] == [("add", "changed")]
    assert found.diffs[0].text.endswith("-x = 1\n+# 2\n+x = 3\n")
    strict = _compare(suite, old, new, expect_identical=True)
    assert strict.exit_code == 1
    # What differs is said first, kernel by kernel, and after it what that comes to.
    assert _rows(strict, Verdict.REGRESSION) == [(1, "add", "source"), (1, "program", "source")]
    assert [row.tier for row in strict.rows] == sorted(row.tier for row in strict.rows)
    assert strict.findings[0].note.startswith("source changed; ")
    assert all("nothing should" in row.note for row in strict.findings)


def test_other_launches_and_other_machine_code_are_changes_too(suite):
    old = snapshot(suite.cases[0].definition, kernel())
    moved = kernel(digest="2" * 64, text=kernel().text, launches=("always:", "  add[T](), 8 warps"))
    found = _compare(suite, old, snapshot(old.definition, moved))
    assert "+  add[T](), 8 warps" in found.diffs[0].text
    (changed,) = (row for row in found.rows if (row.subject, row.series) == ("add", "source"))
    assert changed.note == "launches changed"
    heavier = {**kernel().series, "registers": 41}
    recompiled = snapshot(old.definition, kernel(cubins={"": "9"}, series=heavier))
    found = _compare(suite, old, recompiled, expect_identical=True)
    assert "machine code is not; differs where nothing should" in found.findings[0].note


def test_other_machine_code_of_the_same_figures_is_no_finding(suite):
    """The assembler for sm_100 gives one of two, by chance."""
    old = snapshot(suite.cases[0].definition, kernel())
    recompiled = snapshot(old.definition, kernel(cubins={"": "9"}))
    found = _compare(suite, old, recompiled, expect_identical=True)
    assert found.exit_code == 0
    (row,) = (row for row in found.rows if (row.subject, row.series) == ("add", "source"))
    assert row.verdict is Verdict.NO_CHANGE and "every figure of it is" in row.note


def test_kernels_that_come_and_go_are_named_with_what_they_cost(suite):
    definition = suite.cases[0].definition
    old = snapshot(definition, kernel())
    new = snapshot(
        definition,
        kernel("mul_00ff", "2" * 64),
        kernel("sum_00ff", "3" * 64, series={"registers": 9, "spills": 8}),
    )
    found = _compare(suite, old, new)
    assert {(d.subject, d.what) for d in found.diffs} >= {
        ("mul", "added"),
        ("sum", "added"),
        ("add", "gone"),
    }
    launches = next(row for row in found.findings if row.series == "launches")
    assert (launches.subject, launches.old, launches.new, launches.gate) == ("call", 1, 2, "+0")
    assert launches.note == "mul 0 → 1, sum 0 → 1, add 1 → 0"
    # A new kernel has nothing to be compared with, but spills are none that it may have.
    assert (2, "sum", "spills") in _rows(found, Verdict.REGRESSION)
    watched = found.of(Verdict.MISSING)
    assert [(row.subject, row.series) for row in watched] == [("add", "watched")]
    assert watched[0].note.endswith("there are mul, sum")


def test_one_kernel_more_does_not_shift_the_others():
    a, b = kernel("add_aaaa", "1" * 64), kernel("add_bbbb", "2" * 64, subject="add#2")
    new = kernel("add_cccc", "3" * 64)
    a2, b2 = replace(a, subject="add#2"), kernel("add_bbbb", "4" * 64, subject="add#3")
    pairs = match_kernels(snapshot("", a, b), snapshot("", new, a2, b2))
    assert pairs == [(None, new), (a, a2), (b, b2)]
    assert match_kernels(snapshot("", a, b), snapshot("", new)) == [(a, new), (b, None)]


def test_parts_of_a_kernel_are_compared_one_by_one(suite):
    definition = suite.cases[0].definition

    def two(**series):
        known = {"registers (a)": 40, "registers (b)": 60, "spills (a)": 0, "spills (b)": 0}
        return snapshot(definition, kernel(cubins={"a": "1", "b": "2"}, series={**known, **series}))

    found = _compare(suite, two(), two(**{"registers (a)": 60, "spills (b)": 4}))
    assert _rows(found, Verdict.REGRESSION) == [
        (2, "add", "registers (a)"),
        (2, "add", "spills (b)"),
    ]
    # One binary became two: the first is compared, and the other may not spill.
    alone = snapshot(definition, kernel(series={"registers": 30, "spills": 0}))
    found = _compare(suite, alone, two(**{"spills (b)": 4}))
    assert _rows(found, Verdict.REGRESSION) == [
        (2, "add", "registers (a)"),
        (2, "add", "spills (b)"),
    ]


def test_counts_that_a_side_leaves_out_are_none(suite):
    definition = suite.cases[0].definition
    counted = {**kernel().series, "global loads 16-bit": 2, "HMMA": 8}
    more = kernel(cubins={"": "9"}, series=counted)
    old, new = snapshot(definition, kernel()), snapshot(definition, more)
    assert _rows(_compare(suite, old, new), Verdict.REGRESSION) == [
        (2, "add", "global loads 16-bit")
    ]
    assert _rows(_compare(suite, new, old), Verdict.IMPROVEMENT) == [
        (2, "add", "global loads 16-bit")
    ]
    changed = [row for row in _rows(_compare(suite, new, old), Verdict.CHANGED) if row[0] == 2]
    assert changed == [(2, "add", "HMMA")]


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ((("captured", "a"), ("norm", "b"), ("fuse", "c")), ""),
        ((("captured", "z"), ("norm", "b"), ("fuse", "c")), "captured graph differs"),
        (
            (("captured", "a"), ("norm", "z"), ("fuse", "y")),
            "pass norm makes another graph: *PASS_LIMIT=0 ",
        ),
        ((("captured", "a"), ("norm", "b"), ("fuse", "z")), "pass fuse makes *PASS_LIMIT=1 "),
        ((("captured", "a"), ("norm", "b")), "pass fuse is gone: *PASS_LIMIT=1 "),
        ((("captured", "a"), ("fuse", "b")), "pass norm is gone: *PASS_LIMIT=0 "),
        (
            (("captured", "a"), ("norm", "b"), ("split", "d"), ("fuse", "e")),
            "pass split is new: *PASS_LIMIT=1 ",
        ),
        ((("captured", "a"), ("norm", "b"), ("idle", "b"), ("fuse", "c")), ""),
    ],
)
def test_the_first_pass_that_differs_is_named(passes, words):
    note = first_pass((("captured", "a"), ("norm", "b"), ("fuse", "c")), passes)
    assert all(word in note for word in words.split("*"))
    assert bool(note) == bool(words)


def test_what_is_missing_or_stale_never_passes(suite):
    one = snapshot(suite.cases[0].definition, kernel())
    here = {"new_side": HERE}
    none = compare_snapshots(suite, None, {KEY: one}, **here)
    assert _rows(none, Verdict.MISSING) == [(1, "case", "baseline")]
    assert none.exit_code == 1
    empty = Baseline(Side("base", versions=one.versions), "small", "", {})
    lacking = compare_snapshots(suite, empty, {KEY: one}, **here)
    assert "lacks it" in lacking.findings[0].note
    stale = _compare(suite, replace(one, definition="other"), one)
    assert "stale" in stale.findings[0].note
    full = replace(empty, snapshots={KEY: one, ("old", "h100"): one})
    uncollected = compare_snapshots(suite, full, {}, **here)
    assert ["not collected" in row.note for row in uncollected.findings] == [True, False]
    left_over = compare_snapshots(suite, full, {KEY: one}, **here)
    assert [(row.case, row.verdict) for row in left_over.findings] == [("old", Verdict.MISSING)]
    assert compare_snapshots(suite, full, {KEY: one}, only=["norm"], **here).exit_code == 0


def test_other_versions_are_refused_with_each_difference(suite):
    old = snapshot(suite.cases[0].definition, kernel())
    old = replace(old, versions={**old.versions, "triton": "1.2", "torch": "0.4"})
    with pytest.raises(UsageError, match=r"triton 1.2 against .*torch 0.4 against .*record"):
        _compare(suite, old, replace(old, versions=versions()))
    ours = replace(old, versions={**versions(), "tilewright": "0"})
    assert _compare(suite, ours, replace(ours, versions=versions())).exit_code == 0


def test_a_suite_of_which_nothing_is_chosen_is_refused(suite):
    one = snapshot(suite.cases[0].definition, kernel())
    with pytest.raises(UsageError, match="at least one case to compare, found none chosen"):
        _compare(suite, one, one, only=())
    with pytest.raises(UsageError, match="none in the suite"):
        _compare(replace(suite, cases=()), one, one)


def test_machine_code_that_stays_the_same_is_said(suite):
    old = snapshot(suite.cases[0].definition, kernel(cubins={"": "c"}))
    for cubin, same in (("c", True), ("d", False)):
        new = kernel(digest="2" * 64, cubins={"": cubin})
        found = _compare(suite, old, snapshot(old.definition, new))
        notes = [row.note for row in found.rows if row.subject == "add" and row.tier == 1]
        assert notes == ["source changed" + "; machine code is the same" * same]


@pytest.mark.quick
def test_series_of_one_side_are_shown_and_blamed_on_nobody(suite):
    definition = suite.cases[0].definition
    old = snapshot(definition, kernel())
    two = {**old.series["call"], "waits": 3, "python calls (3.11)": 5}
    more = kernel(series={**kernel().series, "waits": 3, "programs (call)": 8})
    new = snapshot(definition, more, series={"call": two, "other": {"launches": 1}})
    found = _compare(suite, old, new)
    assert not found.findings and not found.of(Verdict.IMPROVEMENT)
    changed = {(row.subject, row.series): row.note for row in found.of(Verdict.CHANGED)}
    # The kernel's machine code is the same, so the old side did not count its waits.
    assert set(changed) == {
        ("call", "waits"), ("other", "launches"), ("add", "waits"), ("add", "programs (call)")
    }  # fmt: skip
    assert all("no baseline: record it" in note for note in changed.values())
    gone = _compare(suite, new, old).of(Verdict.CHANGED)
    assert {(row.subject, row.series) for row in gone} == set(changed)
    assert all("it is gone" in row.note for row in gone)


def test_python_calls_of_one_version_are_compared_with_those_of_the_same(suite):
    def calls(counts):
        series = {"compile": {f"python calls ({name})": n for name, n in counts.items()}}
        return snapshot(suite.cases[0].definition, kernel(), series=series)

    def both(old, new):
        found = _compare(suite, old, new)
        return [(row.series, row.verdict) for row in found.rows if row.subject == "compile"]

    assert both(calls({"3.11": 100}), calls({"3.12": 900})) == []
    found = both(calls({"3.11": 100}), calls({"3.11": 200, "3.12": 1}))
    assert found == [("python calls (3.11)", Verdict.REGRESSION)]


def test_what_costs_comes_before_the_kernels_and_heavy_kernels_before_light_ones(suite):
    definition = suite.cases[0].definition
    names = ("light", "heavy", "gone")
    old, new = (
        snapshot(
            definition,
            *(kernel(f"{name}_ab12", digest * 64, cubins={"": digest}) for name in names[:count]),
            parts={"call": {"light": (1, 1, 1), "heavy": (1, 9, 9), "gone": (5, 50, 50)}},
        )
        for digest, count in (("1", 3), ("2", 2))
    )
    subjects = [row.subject for row in _compare(suite, old, new, only=["norm"]).rows]
    at = [subjects.index(name) for name in ("program", "call", "gone", "heavy", "light")]
    assert at == sorted(at)
    # All that is said of a kernel is in one place.
    assert len(list(groupby(subjects))) == len(set(subjects))


def test_programs_are_of_phases_even_where_a_binary_is_called_like_one(suite):
    definition = suite.cases[0].definition

    def two(*labels, **series):
        known = {f"registers ({label})": 40 for label in labels}
        return snapshot(definition, kernel(cubins={n: n for n in labels}, series=known | series))

    def moved(old, new):
        found = _compare(suite, old, new)
        return {row.series: (row.old, row.new, row.verdict) for row in found.rows if row.old}

    old = two("decode", "prefill", **{"programs (prefill)": 8, "programs (call)": 4})
    new = two("decode", "prefill", **{"programs (prefill)": 8, "programs (call)": 5})
    found = moved(old, new)
    assert found["programs (prefill)"] == (8, 8, Verdict.NO_CHANGE)
    assert found["programs (call)"] == (4, 5, Verdict.REGRESSION)
    # A phase is no binary, so that a kernel with one is still compared with one that has two.
    alone = snapshot(definition, kernel(series={"registers": 30, "programs (call)": 4}))
    assert moved(alone, new)["registers (decode)"] == (30, 40, Verdict.REGRESSION)

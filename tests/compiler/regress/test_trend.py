"""From comparisons to histories and back: what is kept, and what is said of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regress_suites import GRAPH, HEAD, kernel, snapshot, suite_of
from tilewright.autotune.history import (
    History,
    HistoryEntry,
    HistoryRule,
    Point,
    append_entry,
    read_history,
)
from tilewright.autotune.verdicts import Interval, Verdict
from tilewright.compiler.regress.model import Comparison, Row, Side
from tilewright.compiler.regress.run import Outcome
from tilewright.compiler.regress.timing.session import Timed
from tilewright.compiler.regress.trend import GENERATED, entries_of, judged_plots
from tilewright.errors import UsageError

NOW = datetime.now(UTC)
ADD = "llama.h100/add/time (decode b1)"
RULE = HistoryRule()


@pytest.fixture
def suite(tmp_path):
    return suite_of(tmp_path, HEAD + GRAPH)


def row(value=1e-3, ratio=(1.01, 1.0, 1.02), **more) -> Row:
    known = {
        "tier": 3,
        "case": "llama",
        "target": "h100",
        "subject": "add",
        "series": "time (decode b1)",
        "owner": "kernels",
        "unit": "s",
        "better": "lower",
        "old": value,
        "new": value,
        "gate": "3%",
        "verdict": Verdict.NO_CHANGE,
        "ratio": ratio and Interval(*ratio),
    }
    return Row(**{**known, **more})


def outcome(suite, rows=None, pinned=None, **series) -> Outcome:
    shot = snapshot(suite.cases[0].definition, kernel(series={"registers": 40, **series}))
    versions = {"torch": "2"}
    side = Side("working tree", "c" * 40, NOW.isoformat(timespec="seconds"), None, versions)
    found = Comparison(suite.name, side, side, ())

    def timed(rows):
        return None if rows is None else Timed(tuple(rows), "H100 80GB", versions, {}, 1.0)

    return Outcome(found, {("norm", "h100"): shot}, timed(rows), timed(pinned))


@pytest.mark.quick
def test_a_comparison_is_kept_and_drawn(suite, tmp_path):
    rows = [
        row(),
        row(subject="serving loop", series="throughput", unit="tok/s", better="higher", value=9e3),
        row(subject="aten/mm", ratio=None, new=None, verdict=Verdict.CHANGED),
        row(subject="mul", ratio=None, verdict=Verdict.UNDECIDABLE),
    ]
    path = tmp_path / "results.jsonl"
    for entry in entries_of(outcome(suite, rows, [row(ratio=(1.2, 1.1, 1.3))]), suite):
        append_entry(path, entry)
    history = read_history(path)
    assert history.broken == ()
    generated, measured = history.entries
    assert (generated.device, measured.device) == (GENERATED, "H100 80GB")
    assert generated.commit == measured.commit == "c" * 40 and generated.suite == "small"
    assert set(measured.values) == {ADD, "llama.h100/serving loop/throughput"}
    point = measured.values[ADD]
    assert (point.value, point.unit, point.better) == (1e-3, "s", "lower")
    assert point.low == pytest.approx(1e-3 * 1.0 / 1.01)
    assert point.high == pytest.approx(1e-3 * 1.02 / 1.01)
    assert point.ratio_to_pinned == Interval(1.2, 1.1, 1.3)
    assert measured.values["llama.h100/serving loop/throughput"].better == "higher"
    plots = {plot.name: plot for plot in judged_plots(history, None, RULE)}
    assert set(plots) == {*measured.values, *generated.values}
    plot = plots[ADD]
    assert (plot.case, plot.target, plot.subject) == ("llama", "h100", "add")
    assert (plot.series, plot.unit, plot.points[0].value) == ("time (decode b1)", "s", 1e-3)
    assert plot.verdict is Verdict.REGRESSION  # of the pinned baseline
    assert plots["norm.h100/add/registers"].points[0].commit == "c" * 40


def test_zeros_and_what_has_no_good_direction_are_left_out(suite):
    entry = entries_of(outcome(suite, spills=0, threads=128, instructions=100), suite)[0]
    assert set(entry.values) == {
        "norm.h100/add/registers",
        "norm.h100/add/instructions",
        "norm.h100/call/launches",
        "norm.h100/call/roofline",
    }
    assert entry.values["norm.h100/call/roofline"].unit == "s"
    assert len(entries_of(outcome(suite), suite)) == 1


def test_the_pinned_side_alone_is_an_entry_of_its_own(suite):
    found = entries_of(outcome(suite, None, [row(ratio=(1.2, 1.1, 1.3))]), suite)
    assert found[1].values[ADD].ratio_to_pinned == Interval(1.2, 1.1, 1.3)


positive = st.floats(1e-9, 1e9)


@given(positive, st.tuples(positive, positive, positive).map(sorted))
def test_whatever_was_measured_can_be_kept(tmp_path_factory, value, ends):
    low, middle, high = ends
    path = tmp_path_factory.mktemp("history") / "results.jsonl"
    suite = suite_of(path.parent, HEAD + GRAPH)
    for ratio in ((middle, low, high), (middle, middle, middle), (middle, 0.0, float("inf"))):
        (_, entry) = entries_of(outcome(suite, [row(value, ratio)]), suite)
        append_entry(path, entry)
        point = read_history(path).entries[-1].values[ADD]
        assert point.low <= point.value <= point.high


def history_of(*runs) -> History:
    """From (device, suite, days ago, values by name)."""
    entries = []
    for device, suite, days, values in runs:
        time = (NOW - timedelta(days=days)).isoformat(timespec="seconds")
        points = {name: Point(v, v, v) for name, v in values.items()}
        entries.append(HistoryEntry(time, None, device, {}, suite, points))
    return History(tuple(entries))


def test_devices_do_not_mix():
    runs = [("H100", "s", 30 - i, {ADD: 1e-3}) for i in range(30)]
    runs += [("A100", "s", 30 - i, {ADD: 2e-3}) for i in range(30)]
    plots = judged_plots(history_of(*runs), None, RULE)
    assert [plot.verdict for plot in plots] == [Verdict.NO_CHANGE] * 2
    assert [{point.value for point in plot.points} for plot in plots] == [{1e-3}, {2e-3}]
    (one,) = judged_plots(history_of(*runs), "A100", RULE)
    assert len(one.points) == 30 and one.pinned == 2e-3
    with pytest.raises(UsageError, match=r"entries of B200, found A100 \(s\), H100 \(s\)"):
        judged_plots(history_of(*runs), "B200", RULE)
    with pytest.raises(UsageError, match="no usable entries"):
        judged_plots(History(()), None, RULE)


def test_devices_of_other_suites_are_left_aside(suite):
    runs = [("H100", suite.name, 1, {ADD: 1.0}), ("A100", "another", 1, {ADD: 2.0})]
    (plot,) = judged_plots(history_of(*runs), None, RULE, suite)
    assert plot.points[0].value == 1.0
    with pytest.raises(UsageError, match="entries of any device for the suite small"):
        judged_plots(history_of(runs[1]), None, RULE, suite)


@pytest.mark.parametrize(("gate", "verdict"), [("2%", "regression"), ("20%", "no change")])
def test_thresholds_are_the_suites(tmp_path, gate, verdict):
    text = HEAD + f'[thresholds]\n"add/time" = "{gate}"\n' + GRAPH
    suite = suite_of(tmp_path, text)
    runs = [("H100", "small", 60 - i, {ADD: 1.0 + 0.04 * (i > 20)}) for i in range(60)]
    (plot,) = judged_plots(history_of(*runs), None, RULE, suite)
    assert plot.verdict == verdict
    assert [step.at for step in plot.change_points] == ([21] if gate == "2%" else [])


def test_a_name_with_slashes_is_taken_apart_from_both_ends():
    name = "llama.v2.h100/aten/mm/time (decode b1)"
    (plot,) = judged_plots(history_of(("H100", "s", 1, {name: 1.0})), None, RULE)
    parts = (plot.case, plot.target, plot.subject, plot.series)
    assert parts == ("llama.v2", "h100", "aten/mm", "time (decode b1)")


OTHER = "llama.h100/mul/registers"


def ended(device, missing, newest=0):
    """A series that is absent from the last entries."""
    runs = [(device, "s", newest + 40 - i, {ADD: 1.0, OTHER: 1.0}) for i in range(41 - missing)]
    runs += [(device, "s", newest + missing - 1 - i, {OTHER: 1.0}) for i in range(missing)]
    plots = {plot.name: plot for plot in judged_plots(history_of(*runs), None, RULE)}
    assert plots[OTHER].verdict is (Verdict.MISSING if newest > 14 else Verdict.NO_CHANGE)
    return plots[ADD]


def test_a_series_that_has_ended_is_not_missed_for_ever():
    assert ended("H100", 1).verdict is Verdict.MISSING
    assert ended("H100", RULE.recent - 1).verdict is Verdict.MISSING
    assert ended("H100", RULE.recent).verdict is Verdict.CHANGED
    found = ended(GENERATED, 1)  # a count that fell to zero, or a kernel that is fused now
    assert (found.verdict, found.note) == (Verdict.CHANGED, "ended: not among the last 1 entries")


@pytest.mark.parametrize("device", ["H100", GENERATED])
def test_a_stale_history_is_missed_whatever_ended(device):
    assert ended(device, RULE.recent, newest=15).verdict is Verdict.MISSING
    assert ended(device, RULE.recent, newest=13).verdict is Verdict.CHANGED

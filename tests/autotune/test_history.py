"""The store of runs: nothing is lost, a broken line costs itself, and creeping is found."""

from __future__ import annotations

import json
import math
import threading
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from tilewright.autotune.history import (
    History,
    HistoryEntry,
    HistoryRule,
    Point,
    append_entry,
    judge_history,
    read_history,
)
from tilewright.autotune.verdicts import Interval, Verdict
from tilewright.errors import UsageError

START = datetime(2026, 1, 1, tzinfo=UTC)


def entry(values=None, *, day=0, device="H100", suite="kernels", commit="c" * 40, **versions):
    values = {"rms_norm": 1e-3} if values is None else values
    points = {
        name: v if isinstance(v, Point) else Point(v, v * 0.99, v * 1.01)
        for name, v in values.items()
    }
    time = (START + timedelta(days=day)).isoformat()
    return HistoryEntry(time, commit, device, versions or {"triton": "3.6"}, suite, points)


def nightly(levels, **options):
    return [entry({"rms_norm": v}, day=day, **options) for day, v in enumerate(levels)]


def noisy(levels, noise=0.003, seed=0):
    rng = np.random.default_rng(seed)
    return [float(v) for v in np.asarray(levels) * 1e-3 * np.exp(rng.normal(0, noise, len(levels)))]


def judge(entries, days=None, **options):
    now = START + timedelta(days=len(entries) if days is None else days)
    (result,) = judge_history(History(tuple(entries)), "H100", now=now, **options)
    return result


@pytest.mark.quick
def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "history.jsonl"
    ratio = Interval(1.01, 0.0, math.inf)
    written = [
        entry(),
        entry({"tok/s": Point(900.0, 0.0, math.inf, "tokens/s", "higher", ratio)}, commit=None),
        entry({}, device="ÄÖ 🖥"),
    ]
    for one in written:
        append_entry(path, one)
    assert read_history(path) == History(tuple(written))
    json.loads(path.read_text("utf-8").splitlines()[1], parse_constant=pytest.fail)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"time": "2026', "Unterminated"),
        (b"[1, 2]", "not an object"),
        (b"\xff\xfe", "utf-8"),
        (b"{}", "versions"),
        ({"time": "yesterday"}, "yesterday"),
        ({"device": 3}, "device"),
        ({"commit": 3}, "commit"),
        ({"versions": {"triton": 3}}, "versions"),
        ({"values": {"gemm": 3}}, "series gemm: not an object"),
        ({"value": 0}, "series rms_norm.*positive"),
        ({"value": None}, "series rms_norm.*positive"),
        ({"value": "1"}, "series rms_norm.*number"),
        ({"value": True}, "series rms_norm.*number"),
        ({"value": 10**400, "low": None, "high": None}, "too large"),
        ({"low": 2.0}, "series rms_norm.*outside"),
        ({"better": "equal"}, "series rms_norm: better"),
        ({"better": []}, "series rms_norm: better"),
        ({"unit": None}, "series rms_norm: unit"),
        ({"ratio_to_pinned": [1.0]}, "series rms_norm: ratio_to_pinned"),
    ],
)
def test_a_broken_line_is_set_aside_with_its_reason(tmp_path, line, reason):
    path = tmp_path / "history.jsonl"
    append_entry(path, entry(day=0))
    if isinstance(line, dict):
        data = json.loads(path.read_text("utf-8"))
        inside = data["values"]["rms_norm"] if set(line) <= set(POINT_FIELDS) else data
        inside.update(line)
        line = json.dumps(data).encode()
    with path.open("ab") as file:
        file.write(line + b"\n\n")
    append_entry(path, entry(day=1))
    history = read_history(path)
    assert history.entries == (entry(day=0), entry(day=1))
    ((number, found),) = history.broken
    assert number == 2
    with pytest.raises(ValueError, match=reason):
        raise ValueError(found)


POINT_FIELDS = ("value", "low", "high", "unit", "better", "ratio_to_pinned")


@pytest.mark.quick
def test_a_torn_last_line_costs_itself_only(tmp_path):
    path = tmp_path / "history.jsonl"
    append_entry(path, entry(day=0))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:37])
    append_entry(path, entry(day=2))
    history = read_history(path)
    assert history.entries == (entry(day=0), entry(day=2))
    assert [number for number, _ in history.broken] == [2]


def test_an_append_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    append_entry(path, entry(day=0))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        append_entry(path, entry(day=1))
    assert path.read_bytes() == before


def test_those_who_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / "history.jsonl"
    # A line longer than a pipe's atomic write; each append opens, and so locks, for itself.
    many = {f"series {i}": 1.0 + i for i in range(100)}

    def append(first):
        for day in range(first, first + 20):
            append_entry(path, entry(many, day=day))

    threads = [threading.Thread(target=append, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = read_history(path)
    assert not history.broken
    days = sorted((e.when - START).days for e in history.entries)
    assert days == sorted(100 * i + j for i in range(4) for j in range(20))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (entry({"rms_norm": 0.0}), "rms_norm"),
        (entry({"rms_norm": math.nan}), "rms_norm"),
        (entry({"rms_norm": Point(1.0, 2.0, 3.0)}), "outside"),
        (HistoryEntry("soon", None, "H100", {}, "s", {}), "soon"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, bad, reason):
    path = tmp_path / "history.jsonl"
    with pytest.raises(UsageError, match=reason):
        append_entry(path, bad)
    assert not path.exists()


def test_no_file_and_no_device_are_no_pass(tmp_path):
    with pytest.raises(UsageError, match="Record a run"):
        read_history(tmp_path / "none.jsonl")
    history = History((entry(device="A100"), entry(device="H200", suite="e2e")))
    with pytest.raises(UsageError, match=r"A100 \(kernels\), H200 \(e2e\)"):
        judge_history(history, "H100")
    with pytest.raises(UsageError, match="for the suite e2e"):
        judge_history(history, "A100", suite="e2e")


@pytest.mark.quick
def test_devices_and_suites_are_not_mixed():
    other = nightly(noisy([2.0] * 40), device="A100") + nightly(noisy([3.0] * 40), suite="e2e")
    result = judge(nightly(noisy([1.0] * 40)) + other, suite="kernels", days=40)
    assert result.verdict is Verdict.NO_CHANGE
    assert len(result.points) == 40
    assert result.change_points == ()


@pytest.mark.quick
def test_a_slow_drift_is_found_though_no_step_is_large():
    levels = 1.005 ** (np.arange(84) / 7)
    result = judge(nightly(noisy(levels)))
    assert result.verdict is Verdict.REGRESSION
    assert result.pinned.low > 1.03
    assert "of the pinned state" in result.note
    assert all(p.ratio > 1 for p in result.change_points)


def test_a_recent_step_below_the_threshold_is_told_with_what_changed():
    levels = noisy([1.0] * 40 + [1.012] * 8, 0.002)
    entries = nightly(levels[:40]) + [
        entry({"rms_norm": v}, day=40 + i, commit="d" * 40, triton="3.7", torch="2.13")
        for i, v in enumerate(levels[40:])
    ]
    result = judge(entries)
    assert result.verdict is Verdict.REGRESSION
    assert "dddddddddddd, with torch none → 2.13, triton 3.6 → 3.7" in result.note
    assert result.pinned.high < 1.02


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [
        ([1.0] * 40 + [1.012] * 35, Verdict.NO_CHANGE),  # seen long ago, below the threshold
        ([1.0] * 40 + [1.012] * 6 + [1.0] * 6, Verdict.NO_CHANGE),  # recovered
        ([1.0] * 40 + [0.95] * 20, Verdict.IMPROVEMENT),
        ([1.0] * 40 + [0.9] * 6 + [0.95] * 6, Verdict.REGRESSION),  # a part of a gain is lost
        ([1.0] * 8, Verdict.UNDECIDABLE),
        ([1.0], Verdict.UNDECIDABLE),
    ],
)
def test_verdicts_over_time(levels, verdict):
    assert judge(nightly(noisy(levels, 0.002))).verdict is verdict


def test_less_of_what_should_be_more_is_a_regression():
    def throughput(levels):
        points = [Point(v, v, v, "tokens/s", "higher") for v in noisy(levels, 0.002)]
        return judge([entry({"t": p}, day=day) for day, p in enumerate(points)])

    worse, better = throughput([1.0] * 40 + [0.95] * 20), throughput([1.0] * 40 + [1.05] * 20)
    assert worse.verdict is Verdict.REGRESSION
    assert worse.pinned.value == pytest.approx(0.95, abs=0.005)
    assert better.verdict is Verdict.IMPROVEMENT
    assert throughput([1.0] * 40 + [0.988] * 8).verdict is Verdict.REGRESSION
    assert throughput([1.0] * 40 + [1.012] * 8).verdict is Verdict.NO_CHANGE


@pytest.mark.quick
@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Interval(1.04, 1.03, 1.05), Verdict.REGRESSION),
        (Interval(1.04, 1.01, 1.07), Verdict.UNDECIDABLE),
        (Interval(1.0, 0.99, 1.01), Verdict.NO_CHANGE),
        (Interval(0.9, 0.89, 0.91), Verdict.IMPROVEMENT),
        (Interval(1.0, 0.0, math.inf), Verdict.UNDECIDABLE),
    ],
)
def test_a_ratio_to_the_pinned_build_is_believed_before_the_values(ratio, verdict):
    entries = nightly(noisy([1.0] * 30))
    last = Point(1e-3, 0.9e-3, 1.1e-3, ratio_to_pinned=ratio)
    result = judge([*entries, entry({"rms_norm": last}, day=30)])
    assert result.verdict is verdict
    assert result.pinned == ratio


@pytest.mark.quick
def test_what_is_stale_or_gone_fails():
    entries = nightly(noisy([1.0] * 40))
    assert judge(entries, days=39 + 14).verdict is Verdict.NO_CHANGE
    stale = judge(entries, days=39 + 15)
    assert stale.verdict is Verdict.MISSING
    assert "stale: the newest entry is 15 days old, 14 are allowed" in stale.note
    allowed = judge(entries, days=39 + 15, rule=HistoryRule(max_age_days=30))
    assert allowed.verdict is Verdict.NO_CHANGE
    entries.append(entry({"gemm": 1.0}, day=40))
    now = START + timedelta(days=41)
    gone, new = judge_history(History(tuple(entries)), "H100", now=now)
    assert (gone.series, gone.verdict) == ("rms_norm", Verdict.MISSING)
    assert gone.note.startswith("gone: not measured since 2026-02-09")
    assert (new.series, new.verdict) == ("gemm", Verdict.UNDECIDABLE)


def test_entries_are_taken_by_time_whatever_their_order():
    entries = nightly(noisy([1.0] * 40 + [1.05] * 20))
    shuffled = [entries[i] for i in np.random.default_rng(0).permutation(60)]
    assert judge(shuffled) == judge(entries)
    naive = HistoryEntry("2026-01-01T00:00:00", None, "H100", {}, "s", {})
    assert naive.when == START


@pytest.mark.parametrize(
    ("levels", "strict", "loose"),
    [
        ([1.0] * 40 + [1.02] * 20, Verdict.REGRESSION, Verdict.NO_CHANGE),
        ([1.0] * 40 + [1.05] * 60, Verdict.REGRESSION, Verdict.NO_CHANGE),
        ([1.0] * 40 + [1.15] * 60, Verdict.REGRESSION, Verdict.REGRESSION),
    ],
)
def test_a_series_may_have_a_threshold_of_its_own(levels, strict, loose):
    entries = nightly(noisy(levels))
    assert judge(entries).verdict is strict
    assert judge(entries, rule=HistoryRule(thresholds={"rms_norm": 0.1})).verdict is loose


def test_what_was_before_a_moment_is_accepted():
    """A step that was meant fails until the history is judged from behind it."""
    entries = nightly(noisy([1.0] * 20 + [1.1] * 20))
    assert judge(entries).verdict is Verdict.REGRESSION
    behind = History(tuple(entries)).since(START.replace(tzinfo=None) + timedelta(days=20))
    assert behind.entries == tuple(entries[20:])
    assert judge(behind.entries, days=40).verdict is not Verdict.REGRESSION

"""Histories: what a comparison adds to one, and what is drawn and said of one."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from ...autotune.history import (
    Direction,
    History,
    HistoryEntry,
    HistoryRule,
    Point,
    SeriesHistory,
    judge_history,
)
from ...autotune.verdicts import Interval, Verdict
from . import data
from .collect import Key
from .gates import UNITS, bare, rule_of
from .model import Row
from .run import Outcome
from .snapshot import Snapshot
from .suite import Suite
from .timing.session import Timed

GENERATED = "no device: generated code"
"""The device of entries of tier 2, which none was needed for."""
ANY_DEVICE = "any device"


def entries_of(outcome: Outcome, suite: Suite) -> list[HistoryEntry]:
    """What a comparison adds to a history: one entry for what code must cost, one for a device."""
    new = outcome.comparison.new
    now = new.recorded or datetime.now(UTC).isoformat(timespec="seconds")
    values = dict(_costs(outcome.snapshots, suite))
    entries = [HistoryEntry(now, new.commit, GENERATED, new.versions, suite.name, values)]
    measured = outcome.timed or outcome.against_pinned
    if measured is not None:
        pinned = {_name(row): row.ratio for row in _rows(outcome.against_pinned)}
        points = {_name(row): _point(row, pinned.get(_name(row))) for row in _rows(measured)}
        device = measured.device
        entries.append(HistoryEntry(now, new.commit, device, new.versions, suite.name, points))
    return entries


def judged_plots(
    history: History, device: str | None, rule: HistoryRule, suite: Suite | None = None
) -> list[data.SeriesPlot]:
    """Every series of a history, judged and ready to be drawn.

    Args:
        history: of any devices.
        device: whose entries; None: each device's, apart from the others.
        rule: how they are judged.
        suite: its thresholds hold for its series; None: the rule's own for all.

    Raises:
        UsageError: no entries, or none of the device.
    """
    name = suite.name if suite is not None else None
    present = dict.fromkeys(e.device for e in history.entries if name in (None, e.suite))
    plots: list[data.SeriesPlot] = []
    for one in [device or ANY_DEVICE] if device is not None or not present else present:
        entries = history.of(one, name)
        fitted = rule if suite is None else _fitted(rule, suite, entries)
        for series in judge_history(history, one, suite=name, rule=fitted):
            own = [entry for entry in entries if entry.suite == series.suite]
            plots.append(plot_of(_excused(series, own, rule), rule.window))
    return plots


def _excused(
    series: SeriesHistory, entries: Sequence[HistoryEntry], rule: HistoryRule
) -> SeriesHistory:
    """A series that has ended, no longer a failure where somebody must have seen it.

    A kernel's figures end with the kernel, and a count ends at zero: tiers 1 and 2 show that as it
    happens. What was measured is missed for as many entries as a change point counts.
    """
    last = datetime.fromisoformat(series.points[-1].time)
    later = [entry for entry in entries if entry.when > _zoned(last)]
    stale = datetime.now(UTC) - entries[-1].when > timedelta(days=rule.max_age_days)
    seen = later and (entries[-1].device == GENERATED or len(later) >= rule.recent)
    if series.verdict is not Verdict.MISSING or stale or not seen:
        return series
    note = f"ended: not among the last {len(later)} entries"
    return replace(series, verdict=Verdict.CHANGED, note=note)


def _zoned(when: datetime) -> datetime:
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _fitted(rule: HistoryRule, suite: Suite, entries: Sequence[HistoryEntry]) -> HistoryRule:
    """The rule with the suite's gates, where they are shares of the old value."""
    found = {}
    for name in dict.fromkeys(series for entry in entries for series in entry.values):
        _, subject, series = _parts(name)
        gate = suite.rule(subject, series)[1]
        if gate.relative and 0 < gate.allowed < 1:
            found[name] = gate.allowed
    return replace(rule, thresholds=found)


def plot_of(history: SeriesHistory, window: int) -> data.SeriesPlot:
    """A series as it is drawn; its pinned level is the median of the oldest ``window`` points."""
    place, subject, series = _parts(history.series)
    case, _, target = place.rpartition(".")
    points = tuple(
        data.Point(p.time, p.commit, p.point.value, p.point.low, p.point.high)
        for p in history.points
    )
    steps = tuple(data.ChangePoint(c.index, c.before, c.after) for c in history.change_points)
    oldest = [point.value for point in points[:window]]
    return data.SeriesPlot(
        history.series,
        case,
        target,
        subject,
        series,
        history.unit,
        history.better,
        points,
        steps,
        statistics.median(oldest) if history.pinned is not None else None,
        history.verdict,
        history.note,
    )


def _rows(timed: Timed | None) -> Iterator[Row]:
    """The rows that have figures."""
    for row in timed.rows if timed is not None else ():
        if row.new is not None and row.ratio is not None:
            yield row


def _parts(name: str) -> tuple[str, str, str]:
    """Case and target, subject, series, of a name; only a subject may hold more slashes."""
    place, _, rest = name.partition("/")
    subject, _, series = rest.rpartition("/")
    return place, subject, series


def _name(row: Row) -> str:
    return f"{row.case}.{row.target}/{row.subject}/{row.series}"


def _point(row: Row, pinned: Interval | None) -> Point:
    assert row.new is not None and row.ratio is not None
    better: Direction = "higher" if row.better == "higher" else "lower"
    # The interval of the ratio, carried over to the new side; rounding must not shut it out.
    low, high = (row.new * (end / row.ratio.value) for end in (row.ratio.low, row.ratio.high))
    return Point(row.new, min(low, row.new), max(high, row.new), row.unit, better, pinned)


def _costs(snapshots: Mapping[Key, Snapshot], suite: Suite) -> Iterator[tuple[str, Point]]:
    """Series of tier 2 that have a good direction and are not nothing."""
    for (case, target), snapshot in snapshots.items():
        kernels = {kernel.subject: kernel.series for kernel in snapshot.kernels}
        every = {**snapshot.series, **kernels}
        figures = ((s, name, v) for s, found in every.items() for name, v in found.items())
        for subject, series, value in figures:
            better, _ = rule_of(subject, series, suite.thresholds)
            if value > 0 and better != "equal":
                unit = UNITS.get(bare(series), "")
                point = Point(float(value), float(value), float(value), unit, better)
                yield f"{case}.{target}/{subject}/{series}", point

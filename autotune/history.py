"""What was measured over time, and whether it crept.

The store is a file of JSON lines under git or in any folder, one run a line, so that it can be
appended to, merged and read in a diff. Only whole lines count: a broken one is set aside with its
number and reason, and the rest is used. In JSON null stands for an end that says nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import UsageError
from .change_points import ChangePoint, change_points, drift
from .verdicts import Interval, Verdict

Direction = Literal["lower", "higher"]


@dataclass(frozen=True, slots=True)
class Point:
    """One series in one run.

    Attributes:
        value: finite and positive, in `unit`, with its confidence interval `low` to `high`.
        unit: "s", "tokens/s", "bytes", …
        better: which way is good.
        ratio_to_pinned: value over that of the pinned old build, where both ran interleaved.
    """

    value: float
    low: float
    high: float
    unit: str = "s"
    better: Direction = "lower"
    ratio_to_pinned: Interval | None = None


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One run.

    Attributes:
        time: ISO 8601; taken as UTC where it names no zone.
        commit: full hash, where it is known.
        device: name of what was measured on.
        versions: of what may move the figures: driver, torch, Triton, …
        suite: its name.
        values: by series.
    """

    time: str
    commit: str | None
    device: str
    versions: Mapping[str, str]
    suite: str
    values: Mapping[str, Point]

    @property
    def when(self) -> datetime:
        """`time`, with its zone."""
        when = datetime.fromisoformat(self.time)
        return when if when.tzinfo else when.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class History:
    """The lines of a store: those that can be used, and (number from 1, reason) of the others."""

    entries: tuple[HistoryEntry, ...]
    broken: tuple[tuple[int, str], ...] = ()

    def of(self, device: str, suite: str | None = None) -> tuple[HistoryEntry, ...]:
        """The entries of one device (and suite), by time; figures of two devices never mix.

        Raises:
            UsageError: there are none; it names the devices and suites that there are.
        """
        kept = [e for e in self.entries if e.device == device and suite in (None, e.suite)]
        if not kept:
            present = sorted({f"{e.device} ({e.suite})" for e in self.entries})
            raise UsageError(
                "history",
                expected=f"entries of {device}" + (f" for the suite {suite}" if suite else ""),
                found=", ".join(present) or "no usable entries",
                remedy="Record a run on this device first.",
            )
        return tuple(sorted(kept, key=lambda entry: entry.when))

    def since(self, start: datetime) -> History:
        """The entries from a moment on: what was before it is accepted, and the oldest state that
        is held against is the first after it.

        Args:
            start: taken as UTC where it names no zone.
        """
        start = start if start.tzinfo else start.replace(tzinfo=UTC)
        kept = tuple(entry for entry in self.entries if entry.when >= start)
        return History(kept, self.broken)


def append_entry(path: str | Path, entry: HistoryEntry) -> None:
    """Add one run to the store, which is created where it is missing.

    Appending processes wait for each other on a lock of the file. The line reaches the disk before
    this returns; a line that an earlier crash tore is closed first, so that it costs itself only;
    and where writing fails the file gets its old length back.

    Raises:
        UsageError: an entry that could not be read back; nothing is written.
        OSError: the file cannot be written.
    """
    line = json.dumps(_as_json(entry), ensure_ascii=False, allow_nan=False, sort_keys=True)
    try:
        _entry(json.loads(line))
    except ValueError as error:
        raise UsageError(
            "history entry",
            expected="a time in ISO 8601 and positive finite values",
            found=str(error),
            remedy="Leave out the series that failed.",
        ) from error
    with _locked(Path(path)) as descriptor:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = ("\n" if torn else "").encode() + line.encode() + b"\n"
        try:
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file open for appending, locked against other processes until it is closed."""
    import fcntl  # not everywhere; reading a history must work without

    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def read_history(path: str | Path) -> History:
    """All usable lines of a store, in the file's order, and what is wrong with the others.

    Raises:
        UsageError: there is no such file.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise UsageError(
            f"history {path}",
            expected="a file of recorded runs",
            found="none",
            remedy="Record a run into it first, or correct the path.",
        ) from error
    entries: list[HistoryEntry] = []
    broken: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                entries.append(_entry(json.loads(line.decode("utf-8"))))
            except (ValueError, OverflowError, RecursionError) as error:
                broken.append((number, str(error)))
    return History(tuple(entries), tuple(broken))


def _as_json(entry: HistoryEntry) -> dict[str, Any]:
    values = {}
    for name, point in entry.values.items():
        ratio = point.ratio_to_pinned
        values[name] = {
            "value": _end(point.value),
            "low": _end(point.low),
            "high": _end(point.high),
            "unit": point.unit,
            "better": point.better,
            "ratio_to_pinned": ratio and [_end(ratio.value), _end(ratio.low), _end(ratio.high)],
        }
    rest = ("time", "commit", "device", "suite")
    return {
        **{name: getattr(entry, name) for name in rest},
        "versions": dict(entry.versions),
        "values": values,
    }


def _end(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _entry(data: Any) -> HistoryEntry:
    """Raises ValueError with the reason, whatever the data is."""
    if not isinstance(data, dict):
        raise ValueError("not an object")
    versions = _typed(data, "versions", dict)
    if not all(isinstance(version, str) for version in versions.values()):
        raise ValueError("versions: not all are text")
    values = {}
    for name, point in _typed(data, "values", dict).items():
        try:
            values[name] = _point(point)
        except ValueError as error:
            raise ValueError(f"series {name}: {error}") from error
    commit = data.get("commit")
    if commit is not None and not isinstance(commit, str):
        raise ValueError("commit: neither text nor null")
    time, device, suite = (_typed(data, name, str) for name in ("time", "device", "suite"))
    entry = HistoryEntry(time, commit, device, versions, suite, values)
    _ = entry.when  # raises ValueError where it is not a time
    return entry


def _typed(data: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(data.get(name), kind):
        raise ValueError(f"{name}: missing, or not a {kind.__name__}")
    return data[name]


def _point(data: Any) -> Point:
    if not isinstance(data, dict):
        raise ValueError("not an object")
    better: Direction | None = data.get("better")
    if better is None or better not in get_args(Direction):
        raise ValueError(f"better: {better!r} is neither lower nor higher")
    ratio = data.get("ratio_to_pinned")
    pinned = None
    if ratio is not None:
        if not isinstance(ratio, list) or len(ratio) != 3:
            raise ValueError("ratio_to_pinned: not [value, low, high]")
        pinned = _interval(*ratio)
    value = _interval(data.get("value"), data.get("low"), data.get("high"))
    unit = _typed(data, "unit", str)
    return Point(value.value, value.low, value.high, unit, better, pinned)


def _interval(value: Any, low: Any, high: Any) -> Interval:
    for number in (value, low, high):
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise ValueError(f"{number!r} is not a number")
    if value is None or not 0 < value < math.inf:
        raise ValueError(f"{value} is not finite and positive")
    # Values and ratios are positive: the end that says nothing is 0 below.
    low, high = 0.0 if low is None else float(low), math.inf if high is None else float(high)
    if not low <= value <= high:
        raise ValueError(f"{value} lies outside {low} to {high}")
    return Interval(float(value), low, high)


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """A point of a series with the run it is from."""

    time: str
    commit: str | None
    point: Point


@dataclass(frozen=True, slots=True)
class SeriesHistory:
    """One series over time, judged.

    Attributes:
        suite, series: its names.
        unit, better: of the newest point.
        points: by time.
        change_points: indices into `points`.
        pinned: newest over pinned oldest state, as measured (not turned); None where too short.
        verdict, note: the outcome, and why.
    """

    suite: str
    series: str
    unit: str
    better: Direction
    points: tuple[HistoryPoint, ...]
    change_points: tuple[ChangePoint, ...]
    pinned: Interval | None
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True, slots=True)
class HistoryRule:
    """How a history is judged.

    Attributes:
        threshold: the fraction by which the newest state may be worse than the pinned oldest.
        thresholds: of series that have one of their own.
        alpha: the chance of a wrong interval or change point in one reading, shared out over the
            series.
        min_effect: the least change point that counts, as a fraction; of a series with a threshold
            of its own in proportion, for it is as much noisier.
        window: entries that make the oldest and the newest state.
        recent: entries at the end in which a change point for the worse is a regression; older
            ones have been seen, and are held against the pinned state alone. Not fewer than four
            weeks of nights: the steps that stand for a creep lie weeks back when they show.
        max_age_days: a newest entry older than this is stale: nobody is watching any more.
    """

    threshold: float = 0.02
    thresholds: Mapping[str, float] = field(default_factory=dict)
    alpha: float = 0.01
    min_effect: float = 0.005
    window: int = 10
    recent: int = 28
    max_age_days: float = 14.0


def judge_history(
    history: History,
    device: str,
    *,
    suite: str | None = None,
    rule: HistoryRule | None = None,
    now: datetime | None = None,
) -> tuple[SeriesHistory, ...]:
    """Every series of a device: change points, comparison with the oldest state, verdict.

    A regression is: the newest state is worse than the pinned one with the whole interval beyond
    the threshold; or the last stretch is worse than a recent one before a change point. MISSING,
    which fails too: the newest entry is stale, or the series is gone from it.

    Args:
        history: of any devices; those of `device` are taken.
        device, suite: which; None: each suite that the device has.
        rule: how; None: the default.
        now: to judge age by; None: the clock.

    Raises:
        UsageError: no entries of this device and suite.
    """
    rule, now = rule or HistoryRule(), now or datetime.now(UTC)
    entries = history.of(device, suite)
    judged: list[SeriesHistory] = []
    for name in dict.fromkeys(entry.suite for entry in entries):
        of_suite = [entry for entry in entries if entry.suite == name]
        series = list(dict.fromkeys(s for entry in of_suite for s in entry.values))
        share = rule.alpha / max(1, len(series))
        judged += (_judged(of_suite, one, rule, share, now) for one in series)
    return tuple(judged)


def _judged(
    entries: Sequence[HistoryEntry], series: str, rule: HistoryRule, alpha: float, now: datetime
) -> SeriesHistory:
    having = [entry for entry in entries if series in entry.values]
    points = tuple(HistoryPoint(e.time, e.commit, e.values[series]) for e in having)
    newest = points[-1].point
    values = [p.point.value for p in points]
    threshold = rule.thresholds.get(series, rule.threshold)
    least = rule.min_effect * threshold / rule.threshold
    steps = change_points(values, max_p=alpha, min_effect=least)
    pinned = newest.ratio_to_pinned
    if pinned is None and len(values) > 1:
        pinned = drift(values, alpha, rule.window)
    verdict, note = _against_pinned(pinned, newest.better, threshold)
    recent = [step for step in steps if step.index >= len(values) - rule.recent]
    if verdict is not Verdict.REGRESSION and (worse := _lasting(recent, newest.better, least)):
        verdict, note = Verdict.REGRESSION, _step_words(worse, having)
    if missing := _missing(entries, having, rule, now):
        verdict, note = Verdict.MISSING, missing
    suite, unit, better = entries[-1].suite, newest.unit, newest.better
    return SeriesHistory(suite, series, unit, better, points, steps, pinned, verdict, note)


def _against_pinned(
    pinned: Interval | None, better: Direction, threshold: float
) -> tuple[Verdict, str]:
    if pinned is None or pinned.high == math.inf or pinned.low <= 0:
        return Verdict.UNDECIDABLE, "too few entries for a comparison with the pinned state"
    words = f"×{pinned.value:.4f} [{pinned.low:.4f}, {pinned.high:.4f}] of the pinned state"
    low, high = pinned.low, pinned.high
    if better == "higher":
        low, high = 1 / high, 1 / low
    if low > 1 + threshold:
        return Verdict.REGRESSION, words
    if high < 1 / (1 + threshold):
        return Verdict.IMPROVEMENT, words
    return (Verdict.NO_CHANGE if high < 1 + threshold else Verdict.UNDECIDABLE), words


def _lasting(steps: Sequence[ChangePoint], better: Direction, least: float) -> ChangePoint | None:
    """The first step after which the series is still worse than before; None: it recovered."""
    turn = -1 if better == "higher" else 1
    for step in steps:
        if (steps[-1].after / step.before) ** turn > 1 + least:
            return step
    return None


def _step_words(step: ChangePoint, entries: Sequence[HistoryEntry]) -> str:
    """When and at which commit, and which versions changed with it: often they are the cause."""
    before, after = entries[step.index - 1], entries[step.index]
    words = f"×{step.ratio:.4f} at {after.time}"
    if after.commit:
        words += f", commit {after.commit[:12]}"
    changed = [
        f"{name} {before.versions.get(name, 'none')} → {after.versions.get(name, 'none')}"
        for name in sorted({*before.versions, *after.versions})
        if before.versions.get(name) != after.versions.get(name)
    ]
    return words + (f", with {', '.join(changed)}" if changed else "")


def _missing(
    entries: Sequence[HistoryEntry],
    having: Sequence[HistoryEntry],
    rule: HistoryRule,
    now: datetime,
) -> str:
    age = now - having[-1].when
    if age > timedelta(days=rule.max_age_days):
        return f"stale: the newest entry is {age.days} days old, {rule.max_age_days:g} are allowed"
    if having[-1] is not entries[-1]:
        return f"gone: not measured since {having[-1].time}"
    return ""

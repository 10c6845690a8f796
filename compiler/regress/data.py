"""A comparison as JSON and back, and the plain structure that plots of histories are drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, NoReturn, TypeVar, cast, get_args

from ...autotune.verdicts import Interval, Verdict
from ...errors import UsageError
from .model import Better, Comparison, Diff, Row, Side

KIND = "regress comparison"
FORMAT = 1
What = Literal["changed", "added", "gone"]

T = TypeVar("T")


class Point(NamedTuple):
    """One measurement of a series; ``low`` and ``high`` are the interval's ends, None unknown."""

    time: str  # ISO 8601
    commit: str | None
    value: float
    low: float | None
    high: float | None


class ChangePoint(NamedTuple):
    """A step in a series: the place of the first point after it, the levels before and after."""

    at: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class SeriesPlot:
    """The history of one series.

    Attributes:
        name: a title for reading.
        case, target, subject, series: of the suite, as in a `Row`.
        unit: "", "bytes", "s", …
        better: which way is good.
        points: oldest first.
        change_points: by index.
        pinned: the value of the old baseline that is always compared with.
        verdict: the outcome over the history.
        note: whatever helps to understand it.
    """

    name: str
    case: str
    target: str
    subject: str
    series: str
    unit: str
    better: Better
    points: tuple[Point, ...]
    change_points: tuple[ChangePoint, ...] = ()
    pinned: float | None = None
    verdict: Verdict = Verdict.NO_CHANGE
    note: str = ""


def comparison_data(comparison: Comparison) -> dict[str, object]:
    """The comparison as plain data that JSON can hold; ``read_comparison`` is its inverse.

    A number that is not finite is written as a string, an open end of an interval as null.
    ``exit_code`` and ``counts`` are for readers of the JSON; they follow from the rows.
    """
    return {
        "kind": KIND,
        "format": FORMAT,
        "suite": comparison.suite,
        "exit_code": comparison.exit_code,
        "counts": {verdict.value: len(comparison.of(verdict)) for verdict in Verdict},
        "strict": comparison.strict,
        "seconds": _number(comparison.seconds),
        "old": _side_data(comparison.old),
        "new": _side_data(comparison.new),
        "rows": [_row_data(row) for row in comparison.rows],
        "diffs": [_plain(diff) for diff in comparison.diffs],
    }


def plot_data(plot: SeriesPlot) -> dict[str, object]:
    """A series' history as plain data; what is not finite is null, for no plot can show it."""
    return {
        **_plain(plot),
        "verdict": plot.verdict.value,
        "points": [[p[0], p[1], *map(_finite, p[2:])] for p in plot.points],
        "change_points": [[c[0], *map(_finite, c[1:])] for c in plot.change_points],
        "pinned": _finite(plot.pinned),
    }


def _plain(value: Row | Diff | Side | SeriesPlot) -> dict[str, object]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _side_data(side: Side) -> dict[str, object]:
    return {**_plain(side), "versions": dict(side.versions)}


def _row_data(row: Row) -> dict[str, object]:
    data = _plain(row)
    data |= {"verdict": row.verdict.value, "old": _number(row.old), "new": _number(row.new)}
    if row.ratio is not None:
        value, low, high = row.ratio.value, row.ratio.low, row.ratio.high
        data["ratio"] = {
            "value": _number(value),
            "low": None if low == -math.inf else _number(low),
            "high": None if high == math.inf else _number(high),
        }
    return data


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def read_comparison(data: object) -> Comparison:
    """The comparison that ``comparison_data`` wrote.

    Raises:
        UsageError: data of another kind or format, a field that is missing or of a wrong type.
    """
    top = _Fields(data, "comparison")
    top.one_of("kind", (KIND,))
    if top.take("format") != FORMAT:
        _refuse("comparison.format", str(FORMAT), repr(top.take("format")))
    return Comparison(
        suite=top.text("suite"),
        old=_read_side(top.inner("old")),
        new=_read_side(top.inner("new")),
        rows=tuple(_read_row(row) for row in top.each("rows")),
        diffs=tuple(_read_diff(diff) for diff in top.each("diffs")),
        seconds=top.number("seconds"),
        strict=top.flag("strict"),
    )


def _read_side(side: _Fields) -> Side:
    versions = side.inner("versions")
    return Side(
        label=side.text("label"),
        commit=side.maybe("commit", side.text),
        recorded=side.maybe("recorded", side.text),
        reason=side.maybe("reason", side.text),
        versions={name: versions.text(name) for name in versions.data},
        device=side.maybe("device", side.text),
    )


def _read_row(row: _Fields) -> Row:
    texts = ("case", "target", "subject", "series", "owner", "unit", "gate", "note")
    ratio = row.inner("ratio") if row.take("ratio") is not None else None
    return Row(
        **{name: row.text(name) for name in texts},
        tier=row.whole("tier"),
        better=cast(Better, row.one_of("better", get_args(Better))),
        old=row.maybe("old", row.number),
        new=row.maybe("new", row.number),
        verdict=Verdict(row.one_of("verdict", tuple(Verdict))),
        ratio=_read_interval(ratio) if ratio is not None else None,
    )


def _read_interval(ratio: _Fields) -> Interval:
    low, high = (ratio.maybe(end, ratio.number) for end in ("low", "high"))
    return Interval(
        ratio.number("value"),
        -math.inf if low is None else low,
        math.inf if high is None else high,
    )


def _read_diff(diff: _Fields) -> Diff:
    case, target, subject, text = map(diff.text, ("case", "target", "subject", "text"))
    what = cast(What, diff.one_of("what", get_args(What)))
    return Diff(case, target, subject, what, text)


class _Fields:
    """An object of the JSON, and where in it we are."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            _refuse(where, "an object", _kind(data))
        self.data: Mapping[str, object] = data
        self.where = where

    def take(self, name: str) -> object:
        if name not in self.data:
            _refuse(f"{self.where}.{name}", "a value", "nothing")
        return self.data[name]

    def inner(self, name: str) -> _Fields:
        return _Fields(self.take(name), f"{self.where}.{name}")

    def each(self, name: str) -> Iterable[_Fields]:
        found = self.take(name)
        if not isinstance(found, list):
            _refuse(f"{self.where}.{name}", "a list", _kind(found))
        return (_Fields(item, f"{self.where}.{name}[{i}]") for i, item in enumerate(found))

    def maybe(self, name: str, read: Callable[[str], T]) -> T | None:
        return None if self.take(name) is None else read(name)

    def text(self, name: str) -> str:
        found = self.take(name)
        if not isinstance(found, str):
            _refuse(f"{self.where}.{name}", "a string", _kind(found))
        return found

    def flag(self, name: str) -> bool:
        found = self.take(name)
        if not isinstance(found, bool):
            _refuse(f"{self.where}.{name}", "true or false", _kind(found))
        return found

    def whole(self, name: str) -> int:
        found = self.take(name)
        if not isinstance(found, int) or isinstance(found, bool):
            _refuse(f"{self.where}.{name}", "a whole number", _kind(found))
        return found

    def number(self, name: str) -> float:
        found = self.take(name)
        if found in ("inf", "-inf", "nan"):
            return float(str(found))
        if not isinstance(found, int | float) or isinstance(found, bool):
            _refuse(f"{self.where}.{name}", "a number", _kind(found))
        return found

    def one_of(self, name: str, valid: tuple[str, ...]) -> str:
        found = self.take(name)
        if found not in valid:
            _refuse(f"{self.where}.{name}", "one of " + ", ".join(valid), repr(found)[:80])
        return str(found)


def _kind(found: object) -> str:
    return "null" if found is None else type(found).__name__


def _refuse(where: str, expected: str, found: str) -> NoReturn:
    remedy = "Write the file again with `tilewright regress compare --save FILE`."
    raise UsageError(where, expected=expected, found=found, remedy=remedy)

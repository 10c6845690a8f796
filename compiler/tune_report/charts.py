"""Where the marks of a report's charts lie: figures to pixels, nothing of how they look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...autotune.study_report import StudyReport

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34  # margins, for the ticks

_WIDE = 30.0  # of a logarithmic range, beyond which round steps crowd at one end

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a chart.

    Attributes:
        x, y: its centre, in pixels.
        kind: how it looks: "good", "stopped" or "best".
        title: what it says when it is pointed at.
    """

    x: float
    y: float
    kind: str
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart, laid out in WIDTH by HEIGHT pixels.

    Attributes:
        marks: its points.
        line: through these points; none where it is empty.
        reference: the two ends of a dashed line; none where it is empty.
        x_ticks, y_ticks: places of the axes, and what is written there.
        x_label, y_label: of the axes.
    """

    marks: tuple[Mark, ...]
    line: tuple[Point, ...]
    reference: tuple[Point, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_label: str
    y_label: str

    @property
    def path(self) -> str:
        """The line, as SVG has it."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.line)


class Scale:
    """From values to pixels.

    Args:
        values: that must have a place.
        pixels: of the lowest and of the highest.
        log: whether equal factors are equally far; values are then positive.
    """

    def __init__(self, values: Sequence[float], pixels: tuple[float, float], log: bool) -> None:
        self.log = log
        low, high = min(values), max(values)
        if log:
            margin = max((high / low) ** 0.05, 1.01)
            low, high = low / margin, high * margin
        else:
            margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
            low, high = low - margin, high + margin
        self.low, self.high, self.pixels = low, high, pixels

    def __call__(self, value: float) -> float:
        """The place of a value."""
        start, end = self.pixels
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return start + (end - start) * (value - low) / (high - low)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values within, a few of them; powers of ten over a wide logarithmic range."""
        if self.log and self.high / self.low > _WIDE:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1)]
        step = _round((self.high - self.low) / most)
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, math.floor(self.high / step) + 1)]


def history_chart(report: StudyReport) -> Chart | None:
    """Ratio to the default by trial, and the best until then; None where nothing has times."""
    rows = [(one, one.ratio) for one in report.tried if one.ratio is not None]
    if not rows:
        return None
    best = report.history
    x = Scale([one.number for one, _ in rows], (LEFT, WIDTH - RIGHT), log=False)
    y = Scale([1.0, *(ratio for _, ratio in rows)], (HEIGHT - BOTTOM, TOP), log=True)
    steps: list[Point] = []
    for number, ratio in best:
        if steps:
            steps.append((x(number), steps[-1][1]))
        steps.append((x(number), y(ratio)))
    steps.append((x(rows[-1][0].number), steps[-1][1]))
    numbers = {number for number, _ in best}
    marks = tuple(
        Mark(
            x(one.number),
            y(ratio),
            "best" if one.number in numbers else "stopped" if one.outcome.stopped else "good",
            f"trial {one.number}: {ratio:.3f} of the default, {one.outcome.config}",
        )
        for one, ratio in rows
    )
    return Chart(
        marks,
        tuple(steps),
        ((LEFT, y(1.0)), (WIDTH - RIGHT, y(1.0))),
        tuple((x(t), f"{t:g}") for t in x.ticks() if t == int(t)),
        tuple((y(t), f"{t:g}×") for t in y.ticks()),
        "trial",
        "time over the default's",
    )


def prediction_chart(report: StudyReport) -> Chart | None:
    """Measured over predicted microseconds; None for fewer than two configs with both."""
    rows = [
        (one, one.predicted * 1e6, one.outcome.median * 1e6)
        for one in report.tried
        if one.outcome.ok and one.predicted and one.outcome.median
    ]
    if len(rows) < 2:
        return None
    x = Scale([predicted for _, predicted, _ in rows], (LEFT, WIDTH - RIGHT), log=True)
    y = Scale([measured for _, _, measured in rows], (HEIGHT - BOTTOM, TOP), log=True)
    low, high = max(x.low, y.low), min(x.high, y.high)
    marks = tuple(
        Mark(
            x(predicted),
            y(measured),
            "best" if one == report.best else "good",
            f"predicted {predicted:.2f} µs, measured {measured:.2f} µs, {one.outcome.config}",
        )
        for one, predicted, measured in rows
    )
    return Chart(
        marks,
        (),
        ((x(low), y(low)), (x(high), y(high))) if low < high else (),
        tuple((x(t), f"{t:g}") for t in x.ticks()),
        tuple((y(t), f"{t:g}") for t in y.ticks()),
        "predicted, µs",
        "measured, µs",
    )


def _round(step: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)

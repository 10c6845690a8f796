"""What ``tilewright tune`` shows: a bar while it measures, and then what became of each problem."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from .console import err, note, out

if TYPE_CHECKING:
    from rich.console import Console

    from ...autotune.search import Progress
    from ...autotune.tunable import Tunable
    from ..tuning import TunedProblem

    Advance = Callable[[Tunable, Progress | None], None]

_SEARCH = 0.8  # of the way of a problem; the rest is its decision


class Pace:
    """How long it will still take, by how long it took until now.

    Args:
        total: problems.
        seconds: for all of them at most.
        now: a clock.
    """

    def __init__(
        self, total: int, seconds: float | None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.seconds, self.now = total, seconds, now
        self.started = now()
        self.ended = self.measured = 0
        self._share = 0.0

    def end(self) -> None:
        """A problem has ended; one that was known took no time, and says nothing about others."""
        self.ended += 1
        self.measured += self._share > 0
        self._share = 0.0

    def left(self, share: float) -> float | None:
        """Seconds left, where ``share`` of the problem at hand is done; None: not known yet."""
        spent = self.now() - self.started
        self._share = share
        measured = self.measured + share
        by_pace = None
        if measured > 0:
            by_pace = spent / measured * (self.total - self.ended - share)
        bounds = [] if self.seconds is None else [max(0.0, self.seconds - spent)]
        return min((x for x in (by_pace, *bounds) if x is not None), default=None)


def share_of(step: Progress) -> float:
    """How much of a problem is done."""
    of_phase = min(1.0, step.done / step.total) if step.total else 0.0
    return _SEARCH * of_phase if step.phase == "search" else _SEARCH + (1 - _SEARCH) * of_phase


def told(step: Progress) -> str:
    """Where a problem's search is, in words."""
    best = "" if step.best is None else f", best {step.best:.3f} of the default's time"
    return f"{step.phase} {step.done}/{step.total}{best}"


@contextmanager
def bars(
    total: int, seconds: float | None = None, console: Console | None = None
) -> Iterator[Advance]:
    """A bar over problems, on stderr, gone when its block ends.

    Yields:
        what is called with a problem and where its search is; with None once it has ended.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    console = console or err()
    columns = (
        BarColumn(16),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
        # Of a narrow terminal it takes what the others leave.
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
    )
    pace = Pace(total, seconds)
    hidden = not console.is_terminal
    with Bars(*columns, console=console, transient=True, expand=True, disable=hidden) as shown:
        task = shown.add_task("compiling", total=total, left="")

        def advance(tunable: Tunable, step: Progress | None) -> None:
            if step is None:
                pace.end()
                shown.update(task, completed=pace.ended)
                return
            share = share_of(step)
            left = pace.left(share)
            shown.update(
                task,
                completed=pace.ended + share,
                left="" if left is None else f"{duration(left)} left",
                description=f"{told(step)}: {tunable.name}",
            )

        yield advance


def duration(seconds: float) -> str:
    """Minutes and seconds: ``1:05``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def print_tuned(done: Sequence[TunedProblem], seconds: float) -> None:
    """A row for each problem that was reached, what came of all, what the searches had to say."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("", "problem", "default", "chosen", "gain", "tried", "config"):
        table.add_column(title, justify="left" if title in ("problem", "config") else "right")
    for number, one in enumerate(done, start=1):
        if one.reached:
            table.add_row(str(number), *_cells(one))
    if table.row_count:
        out().print(table)
        gains = [one.gain for one in done if one.gain is not None]
        mean = f"; geometric mean of gains {geometric_mean(gains):.3f}×" if gains else ""
        measured = sum(one.tuned is not None for one in done)
        out().print(f"{measured} problems measured in {duration(seconds)}{mean}")
    for line in dict.fromkeys(n for one in done if one.tuned for n in one.tuned.notes):
        note(line)


def print_unreached(done: Sequence[TunedProblem]) -> None:
    """Which problems were not reached, by their number."""
    if numbers := [n for n, one in enumerate(done, start=1) if not one.reached]:
        plural = "were" if len(numbers) > 1 else "was"
        note(f"{len(numbers)} of {len(done)} problems {plural} not reached: {spans(numbers)}")


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, those in a row together: ``1, 4-6``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def tuned_data(number: int, one: TunedProblem) -> dict[str, Any]:
    """What became of a problem, as plain data."""
    tuned = one.tuned
    return {
        "number": number,
        "problem": one.tunable.name,
        "reached": one.reached,
        "known": one.reached and tuned is None,
        "gain": one.gain,
        "gain_interval": _interval(one),
        "record": None if one.record is None else one.record.to_json(),
        "choice": None if tuned is None else tuned.choice.to_json(),
        "notes": [] if tuned is None else list(tuned.notes),
        "outcomes": [] if tuned is None else [o.to_json() for o in tuned.outcomes],
    }


def _cells(one: TunedProblem) -> tuple[str, ...]:
    record = one.record
    if record is None:
        return one.tunable.name, "", "", "", "", "the default: nothing was measured"
    changed = {n: v for n, v in record.config.values if record.default.get(n) != v}
    return (
        one.tunable.name,
        _time(record.default_seconds),
        _time(record.seconds),
        _gain(one),
        "known" if one.tuned is None else str(len(one.tuned.outcomes)),
        " ".join(f"{n}={v}" for n, v in changed.items()) or "the default",
    )


def _time(seconds: float) -> str:
    """Of a kernel in microseconds, of a request in milliseconds."""
    return f"{seconds * 1e6:.2f} µs" if seconds < 0.01 else f"{seconds * 1e3:.1f} ms"


def _gain(one: TunedProblem) -> str:
    """The gain over the default; where it was measured now, and is one, with its interval."""
    ends = _interval(one)
    return f"{one.gain:.3f}×" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def _interval(one: TunedProblem) -> list[float] | None:
    """Of the gain; None where it was not measured now, the default stays, or its ends are open."""
    ratio = None if one.tuned is None else one.tuned.choice.ratio
    if ratio is None or not 0 < ratio.low <= ratio.high < math.inf:
        return None
    return [1 / ratio.high, 1 / ratio.low]

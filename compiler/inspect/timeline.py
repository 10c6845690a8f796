"""The part of ``tilewright inspect --html --trace`` on one launch for all layers: what each
multiprocessor does within a step, and what it waits for where it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from ..tune_report.page import render

if TYPE_CHECKING:
    from ...codegen.persistent.trace import StepTrace

ROW, WIDTH = 5, 1280  # pixels: of a program's line, and of the whole
LEAST = 0.05  # pixels of a box that is drawn
CLOSE = 10  # calls of the part that is drawn large: two layers
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")
IDLE = "#c4c0b8"


@dataclass(frozen=True, slots=True)
class Interval:
    """What a program does for a while.

    Attributes:
        line: of the program in the picture.
        form: of the call that it works on; -1 where it does nothing.
        reason: why it does nothing.
        start, stop: in ns since the step began.
    """

    line: int
    form: int
    reason: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Share:
    """What became of the programs' time.

    Attributes:
        name: of a form of call, or of a reason for doing nothing.
        colour: in the picture.
        share: of all programs' time in the step.
        us: microseconds of a program, on average.
    """

    name: str
    colour: str
    share: float
    us: float


@dataclass(frozen=True, slots=True)
class Picture:
    """Boxes of intervals as SVG paths.

    Attributes:
        paths: a colour and its path.
        height: in pixels.
        us: microseconds from the left end to the right one.
    """

    paths: tuple[tuple[str, str], ...]
    height: int
    us: float


def timeline_section(trace: StepTrace | None) -> str:
    """HTML of a step; nothing without one."""
    if trace is None:
        return ""
    template = (files(__package__) / "page" / "page.timeline.html").read_text("utf-8")
    found = list(intervals(trace))
    middle = len(trace.calls) // 2
    close = list(intervals(trace, range(middle, min(middle + CLOSE, len(trace.calls)))))
    works, idle = shares(trace, found)
    return render(
        template,
        title=trace.title,
        programs=len(trace.places),
        places=len(set(trace.places)),
        works=works,
        idle=idle,
        whole=draw(trace, found),
        close=draw(trace, close),
        width=WIDTH,
    )


def intervals(trace: StepTrace, calls: range | None = None) -> Iterator[Interval]:
    """What each program does, from the first mark of the step to its last, without a gap; of some
    calls alone where ``calls`` names them. Lines are in the order of the multiprocessors.
    """
    order = sorted(range(len(trace.places)), key=lambda index: (trace.places[index], index))
    end = max(map(max, trace.times))
    for line, program in enumerate(order):
        times, at = trace.times[program], 0
        for call in calls or range(len(trace.calls)):
            met, begun, done = times[3 * call : 3 * call + 3]
            if calls is None:
                yield Interval(line, -1, "comes to the next call", at, met)
            before = trace.forms[trace.calls[call - 1]] if call else "the launch"
            yield Interval(line, -1, f"waits for {before}", met, begun)
            yield Interval(line, trace.calls[call], "", begun, done)
            at = done
        if calls is None:
            yield Interval(line, -1, "has ended before others", at, end)


def shares(trace: StepTrace, found: Sequence[Interval]) -> tuple[list[Share], list[Share]]:
    """The programs' time by what they did, and by why they did nothing, the longest first."""
    works, idle = dict.fromkeys(range(len(trace.forms)), 0), dict[str, int]()
    for one in found:
        if one.form >= 0:
            works[one.form] += one.stop - one.start
        else:
            idle[one.reason] = idle.get(one.reason, 0) + one.stop - one.start
    programs = len(trace.places)
    whole = max(1, sum(works.values()) + sum(idle.values()))

    def share(name: str, colour: str, time: int) -> Share:
        return Share(name, colour, time / whole, time * 1e-3 / programs)

    named = [share(trace.forms[form], colour_of(form), time) for form, time in works.items()]
    reasons = [share(reason, IDLE, time) for reason, time in idle.items() if time]
    return named, sorted(reasons, key=lambda one: -one.share)


def draw(trace: StepTrace, found: Sequence[Interval]) -> Picture:
    """Boxes of intervals, from the first of them to the last."""
    start, stop = min(one.start for one in found), max(one.stop for one in found)
    scale = WIDTH / max(1, stop - start)
    drawn: dict[str, list[str]] = {}
    for one in found:
        width = (one.stop - one.start) * scale
        if width >= LEAST:
            box = f"M{(one.start - start) * scale:.1f} {one.line * ROW}h{width:.1f}"
            box += f"v{ROW - 1}h-{width:.1f}z"
            drawn.setdefault(IDLE if one.form < 0 else colour_of(one.form), []).append(box)
    paths = tuple((colour, "".join(boxes)) for colour, boxes in drawn.items())
    return Picture(paths, ROW * len(trace.places), (stop - start) * 1e-3)


def colour_of(form: int) -> str:
    """Of a form of call."""
    return COLOURS[form % len(COLOURS)]

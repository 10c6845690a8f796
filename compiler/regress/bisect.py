"""Which commit made a series worse, by binary search over a range of commits.

Each commit that is looked at is checked out beside the user's working tree, and its own code runs
in a process of its own: `tilewright regress record` for what is generated and what it must cost;
engines, timed in turns with those of the good commit, for what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import EngineError, TilewrightError, UsageError
from .culprit import Culprit, Within, culprit_data, explain, render_culprit
from .samples import NO_SERIES, Method, Recorder, Recording, Sample, Timer, Timing
from .single import Watched, record_case
from .snapshot import Snapshot
from .suite import Suite
from .timing.session import time_suite
from .wording import quantity
from .worktrees import SHOWN, Repository

__all__ = ["Culprit", "bisect_series", "culprit_data", "render_culprit", "search"]

Advance = Callable[[str, float], None]
_MEASURED = ("time", "itl", "ttft", "throughput")


def bisect_series(
    repository: Path,
    suite: Suite,
    series: str,
    good: str,
    bad: str,
    *,
    timed: bool = False,
    budget: float = 60.0,
    advance: Advance = lambda phase, share: None,
    recorder: Recorder = record_case,
    timer: Timer = time_suite,
) -> Culprit:
    """The first commit after ``good`` at which a series is worse than there beyond its gate.

    A commit whose code does not compile the case is passed over, and its neighbours are tried.

    Args:
        repository: a folder in the repository of the commits.
        suite: the caller's, so that the case is the same at each commit.
        series: as reports name it, "case.target/subject/series". ".../source" finds the commit that
            changed what is generated.
        good, bad: revisions; good is on the line of first parents of bad.
        timed: whether it is measured on this machine's GPU; it is too if its name says so.
        budget: seconds of measuring a commit.
        advance: told what runs, and the share that is done.
        recorder: collects a case with the code of a checkout.
        timer: times a suite on two checkouts.

    Raises:
        UsageError: unknown revisions or series, ends that are not good and bad, or a commit that
            the noise of this machine leaves undecided.
    """
    watched = Watched.of(suite, series)
    commits = Repository(repository)
    line = (commits.resolve(good), *commits.between(good, bad))
    timed = timed or watched.kind.startswith(_MEASURED)
    advance(f"commit {line[0][:SHOWN]}, which is good", 0.0)
    with commits.checkout(line[0]) as first:
        method: Recording | Timing
        if timed:
            method = Timing(watched, first, timer, budget)
        else:
            method = Recording(watched, (first, line[0]), recorder)
        run = _Run(commits, watched, method, line, advance)
        run.check_ends()
        # The search counts from the commit after the good one.
        low, high = search(len(line) - 1, lambda index: run.sample(line[index + 1]).bad)
    made = method.made if isinstance(method, Recording) else {}
    sides = (line[low + 1], line[high + 1])
    return run.culprit(line[low + 2 : high + 2], _within(run, sides, made, recorder, timed))


def search(count: int, is_bad: Callable[[int], bool | None]) -> tuple[int, int]:
    """Binary search for the first of ``count`` items that is bad; the last one is known to be.

    Each item is asked about at most once, and at most ceil(log2(count)) that can be told of.

    Args:
        count: of the items.
        is_bad: of an item by its index; None where it cannot be told.

    Returns:
        The last good item (-1 for none) and the first bad one; what lies between cannot be told.
    """
    low, high = -1, count - 1
    unknown: set[int] = set()
    # The median of those that are left: each answer halves them, wherever the unknown ones are.
    while left := [index for index in range(low + 1, high) if index not in unknown]:
        middle = left[len(left) // 2]
        bad = is_bad(middle)
        if bad is None:
            unknown.add(middle)
        elif bad:
            high = middle
        else:
            low = middle
    return low, high


@dataclass
class _Run:
    """One bisection: what was found at each commit."""

    commits: Repository
    watched: Watched
    method: Method
    line: tuple[str, ...]
    advance: Advance
    samples: dict[str, Sample] = field(default_factory=dict)

    def check_ends(self) -> None:
        """Good must be something to compare with, and bad must be worse."""
        good, bad = self.line[0], self.line[-1]
        try:
            start = self.samples[good] = self.method.start()
        except EngineError as error:
            raise UsageError(
                f"the good commit {good[:SHOWN]}",
                expected=error.expected,
                found=f"{error.culprit}: {error.found}",
                remedy="Name one that compiles the case as good.",
            ) from error
        end = self.sample(bad)
        unknown = self.method.unknown()
        if unknown is not None and end.note == NO_SERIES:
            raise unknown
        if start.bad or start.bad is None or not end.bad:
            raise self._wrong_ends(start, end)

    def _wrong_ends(self, start: Sample, end: Sample) -> UsageError:
        def words(sample: Sample) -> str:
            if sample.value is None:
                return f"none ({sample.note})"
            return quantity(sample.value, sample.unit)

        good, bad = self.line[0][:SHOWN], self.line[-1][:SHOWN]
        gate = f", where {end.gate} is allowed" if end.gate else ""
        return UsageError(
            f"series {self.watched.series}",
            expected=f"a value at the good commit {good}, and a worse one at the bad one {bad}",
            found=f"{words(start)} and {words(end)}{gate}",
            remedy="Name other ends, or a series that compare calls a regression between them.",
        )

    def sample(self, commit: str) -> Sample:
        """What a commit comes to; one that cannot be told of is passed over."""
        known = len(self.samples)
        steps = 2 + math.ceil(math.log2(len(self.line) - 1))
        share = min(known / steps, 0.95)
        self.advance(f"commit {commit[:SHOWN]}, {known + 1} of about {steps}", share)
        try:
            with self.commits.checkout(commit) as checkout:
                found = self.method.at(checkout, commit)
        except EngineError as error:
            found = Sample(None, None, f"{error.culprit}: {error.found}")
        self.samples[commit] = found
        return found

    def culprit(self, candidates: tuple[str, ...], within: Within) -> Culprit:
        """What is said of it all; the last candidate is the one that is bad."""
        subject, author, date = self.commits.about(candidates[-1])
        seen = [(commit, self.samples[commit]) for commit in self.line if commit in self.samples]
        return Culprit(
            self.watched.series,
            candidates[-1],
            subject,
            author,
            date,
            tuple((commit, sample.value) for commit, sample in seen),
            within.pass_name,
            within.pass_limit,
            within.stage,
            within.kernels,
            within.diffs,
            candidates,
            next((sample.unit for _, sample in reversed(seen) if sample.value is not None), ""),
            within.note,
            tuple((commit, sample.note) for commit, sample in seen if sample.value is None),
        )


def _within(
    run: _Run,
    sides: tuple[str, str],
    made: dict[str, Snapshot],
    recorder: Recorder,
    timed: bool,
) -> Within:
    """Where within the commit it begins; that this cannot be told does not lose the commit."""

    def snapshot(commit: str) -> Snapshot:
        if commit in made:
            return made[commit]
        run.advance(f"recording commit {commit[:SHOWN]}", 0.95)
        with run.commits.checkout(commit) as checkout:
            return recorder(checkout, run.watched.suite)

    try:
        old, new = map(snapshot, sides)
        return explain(run.watched.suite, old, new, timed)
    except TilewrightError as error:
        return Within("unknown", note=str(error))

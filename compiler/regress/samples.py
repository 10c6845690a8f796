"""What a commit comes to against a good one: recorded (tiers 1 and 2) or timed (tier 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ...autotune.verdicts import FAILING, Verdict
from ...errors import EngineError, UsageError
from .baseline import Baseline
from .checkout import Checkout
from .compare import compare_snapshots
from .model import Row, Side
from .single import Watched
from .snapshot import Snapshot
from .suite import Suite
from .timing.session import Timed
from .worktrees import SHOWN

Recorder = Callable[[Checkout, Suite], Snapshot]
NO_SERIES = "it has no such series"


@dataclass(frozen=True, slots=True)
class Sample:
    """What a commit comes to.

    Attributes:
        value: of the series.
        bad: whether that is worse than the good commit's beyond its gate; None: it cannot be told.
        note: why it cannot.
        gate: how far it may move, in words.
        unit: of the value.
    """

    value: float | None
    bad: bool | None
    note: str = ""
    gate: str = ""
    unit: str = ""


class Method(Protocol):
    """How a commit is judged."""

    def start(self) -> Sample:
        """The good commit."""

    def at(self, checkout: Checkout, commit: str) -> Sample:
        """Another one; EngineError where its code does not get so far."""

    def unknown(self) -> UsageError | None:
        """What to say if no row so far was of the series; None if there was one."""


class Timer(Protocol):
    """What times a suite on two checkouts: `time_suite`."""

    def __call__(self, suite: Suite, old: Checkout, new: Checkout, *, budget: float) -> Timed:
        """A row a series."""


@dataclass
class Recording:
    """Tiers 1 and 2: what a commit's code records, compared as `tilewright regress compare` does.

    Attributes:
        watched: the series.
        good: checkout of the good commit, and its hash.
        recorder: runs a checkout's code.
        made: what was recorded, by commit.
    """

    watched: Watched
    good: tuple[Checkout, str]
    recorder: Recorder
    made: dict[str, Snapshot] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def start(self) -> Sample:
        """The good commit, compared with itself."""
        return self.at(*self.good)

    def at(self, checkout: Checkout, commit: str) -> Sample:
        """A commit, compared with the good one."""
        self.made[commit] = self.recorder(checkout, self.watched.suite)
        rows = self._compare(self.made[self.good[1]], self.made[commit])
        self.rows += rows
        found = self.watched.rows(rows)
        if not found:
            return self._without(rows)
        row = next((row for row in found if row.verdict in FAILING), found[0])
        bad = row.verdict in FAILING
        if row.tier == 1:  # it has no figures: 1 where it differs
            return Sample(float(bad), bad, gate=row.gate)
        if row.new is None:
            return Sample(None, None, row.note)
        return Sample(row.new, bad, "", row.gate, row.unit)

    def unknown(self) -> UsageError | None:
        """That neither good nor bad has the series."""
        if self.watched.rows(self.rows) or self._watches():
            return None
        return self.watched.unknown(self.rows, "those that were compared")

    def _compare(self, good: Snapshot, new: Snapshot) -> tuple[Row, ...]:
        suite, key = self.watched.suite, (new.case, new.target)
        before = Baseline(
            Side(self.good[1][:SHOWN], versions=good.versions),
            suite.name,
            suite.digest,
            {key: good},
        )
        # What is generated may differ as it likes, unless that is what is asked about.
        identical = self.watched.kind == "source"
        side = Side("new", versions=new.versions)
        try:
            return compare_snapshots(suite, before, {key: new}, identical, new_side=side).rows
        except UsageError as error:
            raise EngineError(
                error.culprit, expected=error.expected, found=error.found, remedy=error.remedy
            ) from error

    def _without(self, rows: tuple[Row, ...]) -> Sample:
        if self._watches():  # a row is there only where the kernel is not
            return Sample(0.0, False, gate="±0")
        stale = [row.note for row in rows if row.verdict in FAILING and row.series == "baseline"]
        return Sample(None, None, stale[0] if stale else NO_SERIES)

    def _watches(self) -> bool:
        return self.watched.name in [f"{kernel}/watched" for kernel in self.watched.case.watch]


@dataclass
class Timing:
    """Tier 3: engines of a commit, timed in turns with those of the good one.

    Attributes:
        watched: the series.
        good: checkout of the good commit, which stays.
        timer: what times.
        budget: seconds of measuring a commit.
    """

    watched: Watched
    good: Checkout
    timer: Timer
    budget: float
    rows: list[Row] = field(default_factory=list)

    def start(self) -> Sample:
        """The good commit: what others are a multiple of."""
        return Sample(1.0, False, unit="× good")

    def at(self, checkout: Checkout, commit: str) -> Sample:
        """A commit's ratio to the good one.

        Raises:
            EngineError: its code does not compile the case.
            UsageError: no verdict with this noise, or no device to time on.
        """
        timed = self.timer(self.watched.suite, self.good, checkout, budget=self.budget)
        self.rows += timed.rows
        found = self.watched.rows(timed.rows)
        if not found:
            return Sample(None, None, NO_SERIES)
        row = found[0]
        if row.verdict is Verdict.UNDECIDABLE:
            raise UsageError(
                f"commit {commit[:SHOWN]}",
                expected=f"a verdict on {self.watched.series}",
                found=f"none in {self.budget:g} s, with the noise of this machine. {row.note}",
                remedy="Raise --budget, or quiet the machine.",
            )
        if row.old is None or row.new is None or row.verdict in (Verdict.CHANGED, Verdict.MISSING):
            return Sample(None, None, row.note or row.verdict)
        ratio = row.ratio.value if row.ratio is not None else row.new / row.old
        return Sample(ratio, row.verdict is Verdict.REGRESSION, "", row.gate, "× good")

    def unknown(self) -> UsageError | None:
        """That the series is none that was timed."""
        if self.watched.rows(self.rows):
            return None
        return self.watched.unknown(self.rows, "those that are timed")

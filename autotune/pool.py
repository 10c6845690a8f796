"""Measures candidates in a worker process, and survives what they do to it.

Every candidate is raced against one reference, the default: a round is a time of each, one after
the other, their order alternating. What is compared are the ratios of the rounds, so that drifting
clocks, and other devices of the kind, do not matter.

**The sequential test.** A candidate is stopped where it is sure to be slower than the best so far
by more than the finalists' band. Optuna's WilcoxonPruner asks whether it is slower at all, of times
that are paired by their number but were taken minutes apart, without correcting for its repeated
looks, and needs SciPy; so the test is our own: the signed-rank interval of the paired ratios, alpha
shared between its looks, and before there are enough pairs for that, three rounds that are all
slower by a quarter.

**Blame.** A fault may be the doing of what ran before in the same process. So a candidate that
broke its worker is final only if nothing but the reference had run there; otherwise it is tried
once more, alone. After each candidate the reference is checked again: one that writes outside of
its outputs is found out, and cannot spoil those after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from .config import Config
from .outcome import CandidateError, Outcome
from .signed_rank import signed_rank_interval
from .tunable import RunnerSpec, Tunable
from .worker import Limits, Runs, Worker, WorkerError


@dataclass(frozen=True, slots=True)
class Screening:
    """What is spent on a candidate before it may become a finalist.

    Attributes:
        rounds: at most; those that are not stopped have all of them.
        band: how much slower than the best a finalist may be, as a fraction.
        too_slow: a first time of more than so many times the best is the last one.
        clearly: a candidate whose first `clear_rounds` are all slower than the best by this factor
            is stopped.
        clear_rounds: how many.
        looks: rounds after which the interval is looked at.
        alpha: two-sided, of all looks together: half of it is the chance to stop a candidate that
            is at the end of the band.
    """

    rounds: int = 8
    band: float = 0.05
    too_slow: float = 10.0
    clearly: float = 1.25
    clear_rounds: int = 3
    looks: tuple[int, ...] = (5,)
    alpha: float = 0.08


class Pool:
    """One worker process, restarted where it has to be, for one tunable after the other.

    Starting a process with a device takes seconds; it is kept between tunables. Several devices
    are several processes with a pool each, on one study.

    Args:
        limits: how long a worker may take.
        environment: of the workers; None: that of this process.
        start: gives a worker; for tests.

    Attributes:
        starts: workers that were started.
        rounds: times that were taken, of whatever config: what is cached needs none.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
        start: Callable[[], Runs] | None = None,
    ) -> None:
        self._start = start or (lambda: Worker(limits, environment))
        self._worker: Runs | None = None
        self._opened: RunnerSpec | None = None
        self.loaded: set[Config] = set()
        self.strangers = 0  # candidates that ran in this worker
        self.starts = 0
        self.rounds = 0

    def worker(self, spec: RunnerSpec) -> Runs:
        """A worker with this runner.

        Raises:
            WorkerError: none can be had.
        """
        if self._worker is None:
            self._worker = self._start()
            self.starts += 1
        if self._opened is None or self._opened != spec:
            self._opened, self.loaded = None, set()
            try:
                self._worker.open(spec)
            except BaseException:
                self.discard()
                raise
            self._opened = spec
        return self._worker

    def discard(self) -> None:
        """Kill the worker; the next one starts from nothing."""
        worker, self._worker, self._opened = self._worker, None, None
        self.loaded, self.strangers = set(), 0
        if worker is not None:
            worker.close()

    def close(self) -> None:
        """Kill the worker."""
        self.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


class Bench:
    """Measures the configs of one tunable.

    Args:
        pool: where they run.
        tunable: what they are configs of.
        screening: what is spent on each.

    Attributes:
        reference: what candidates are raced against; None until one is known that works.
        trouble: whether a worker was broken since the start.
    """

    def __init__(self, pool: Pool, tunable: Tunable, screening: Screening | None = None) -> None:
        self.pool, self.tunable = pool, tunable
        self.screening = screening or Screening()
        self.reference: Config | None = tunable.default
        self.trouble = False
        self._verified = False

    def screen(self, config: Config, *, best: float | None = None, digest: str = "") -> Outcome:
        """Load, check and race one config.

        Args:
            config: the candidate.
            best: the best ratio to the reference so far.
            digest: of its binary, for the outcome.

        Raises:
            WorkerError: it is not the config's fault: no worker starts, or the reference, which
                worked before, fails in a fresh one.
        """
        while True:
            alone = self.pool.strangers == 0
            try:
                outcome = self._screened(config, best, digest)
            except CandidateError as error:
                if error.breaks:
                    self._break()
                    if not alone:
                        continue  # in a new worker, in which nothing else has run
                outcome = Outcome(config, error.status, error.reason, digest=digest)
            except BaseException:
                self.pool.discard()  # interrupted between question and answer
                raise
            self._settle_reference(outcome)
            return outcome

    def times(self, configs: Sequence[Config]) -> dict[Config, float]:
        """One round: a time of each, in this order. Those that fail, twice, are missing.

        Raises:
            WorkerError: no worker starts.
        """
        found = {}
        for config in configs:
            for _ in range(2):
                try:
                    worker = self.pool.worker(self.tunable.runner)
                    self._load_checked(worker, config)
                    found[config] = self._time(worker, config)
                    break
                except CandidateError:
                    self._break()
                except BaseException:
                    self.pool.discard()
                    raise
        return found

    def refresh(self) -> None:
        """Start anew where a worker was broken: the finalists are then loaded and checked again."""
        if self.trouble:
            self.pool.discard()

    def _screened(self, config: Config, best: float | None, digest: str) -> Outcome:
        worker = self._ready(config)
        if config != self.reference:
            self.pool.strangers += 1
        worker.load(config)
        error = worker.check(config)
        if not error <= 1:  # NaN is not
            if not self._reference_holds(worker, config):
                self._break()
            reason = f"its error is {error:.3g} times the tolerance"
            return Outcome(config, "wrong", reason, error=error, digest=digest)
        seconds, reference, why = self._race(worker, config, best)
        facts = worker.facts()
        if not self._reference_holds(worker, config):
            reason = "the default came out wrong after it ran: it writes outside of its outputs"
            raise CandidateError("wrong", reason, breaks=True)
        self.pool.loaded.add(config)
        slow = len(seconds) == 1 and bool(why)
        return Outcome(
            config,
            "too_slow" if slow else "ok",
            why,
            tuple(seconds),
            error,
            tuple(reference),
            facts,
            digest,
            stopped=bool(why),
        )

    def _race(
        self, worker: Runs, config: Config, best: float | None
    ) -> tuple[list[float], list[float], str]:
        """Times of the config and of the reference, and why it was stopped before the end."""
        seconds: list[float] = []
        reference: list[float] = []
        if self.reference is None or config == self.reference:
            return [self._time(worker, config) for _ in range(self.screening.rounds)], [], ""
        while len(seconds) < self.screening.rounds:
            pair = ((config, seconds), (self.reference, reference))
            for which, times in pair if len(seconds) % 2 else reversed(pair):
                times.append(self._time(worker, which))
            if why := self._stops(np.log(seconds) - np.log(reference), best or 1.0):
                return seconds, reference, why
        return seconds, reference, ""

    def _stops(self, logs: np.ndarray[tuple[int], np.dtype[np.float64]], best: float) -> str:
        rules, n = self.screening, len(logs)
        over = logs - math.log(best)
        if n == 1 and over[0] > math.log(rules.too_slow):
            return f"{math.exp(over[0]):.3g} times as slow as the best"
        if n == rules.clear_rounds and over.min() > math.log(rules.clearly):
            return f"stopped after {n} rounds, each {rules.clearly:g} times the best or more"
        if n in rules.looks:
            interval = signed_rank_interval(over, rules.alpha / len(rules.looks))
            if interval.low > math.log1p(rules.band):
                low = math.exp(interval.low)
                return f"stopped after {n} rounds: {low:.3f} times as slow as the best at least"
        return ""

    def _ready(self, config: Config) -> Runs:
        """A worker in which the reference is loaded and right."""
        reason = ""
        for _ in range(2):
            worker = self.pool.worker(self.tunable.runner)
            if self.reference is None or config == self.reference:
                return worker
            try:
                self._load_checked(worker, self.reference)
            except CandidateError as error:
                reason = error.reason
                self._break()
            else:
                self._verified = True
                return worker
        if not self._verified:  # it never worked: another must be the reference
            self.reference = None
            return self.pool.worker(self.tunable.runner)
        raise WorkerError(
            f"the device that runs {self.tunable.name}",
            expected=f"{self.reference} to work in a fresh process, as before",
            found=reason,
            remedy="See whether the device needs a reset; what was measured is kept.",
        )

    def _load_checked(self, worker: Runs, config: Config) -> None:
        """Once in each worker: load a config that passed elsewhere, and hold it to that."""
        if config in self.pool.loaded:
            return
        worker.load(config)
        error = worker.check(config)
        if not error <= 1:
            reason = f"its error is {error:.3g} times the tolerance in a fresh process"
            raise CandidateError("wrong", reason, breaks=True)
        self.pool.loaded.add(config)

    def _reference_holds(self, worker: Runs, after: Config) -> bool:
        if self.reference is None or after == self.reference:
            return True
        return worker.check(self.reference) <= 1

    def _settle_reference(self, outcome: Outcome) -> None:
        if outcome.config == self.reference:
            self._verified = outcome.ok
            if not outcome.ok:
                self.reference = None
        elif self.reference is None and outcome.ok:
            self.reference, self._verified = outcome.config, True

    def _time(self, worker: Runs, config: Config) -> float:
        self.pool.rounds += 1
        return worker.time(config, 1)[0]

    def _break(self) -> None:
        self.trouble = True
        self.pool.discard()

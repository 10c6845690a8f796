"""When a measured difference is a regression: a sequential rule that can say "not decidable".

What is judged is the confidence interval of the ratio of new to old, by signed ranks over the
logarithms of pairs. With t the slow-down that must be found, and ratios turned so that more than 1
is worse:

    low > 1 + t/2                          regression
    high < 1 / (1 + t/2)                   improvement
    1 / (1 + t) < low and high < 1 + t     no change
    else                                   measure on; after the last look, not decidable

**The dead zone of t/2.** Two loads of the very same code differ: by where their buffers and
instructions lie, by which slices of the L2 they hit. That difference is constant within a process,
so the interval closes in on *it*, not on 1: no number of pairs averages it out, and a rule that
asks for low > 1 would be sure of itself and wrong. What is smaller than t/2 is therefore never
called a change. It costs nothing that was promised: a true ratio of 1 + t lies as far above the
dead zone as 1 lies below it. A series whose loads differ by more needs a larger threshold.

**Many comparisons, many looks.** Each interval is taken at alpha / (series * looks), the union
bound of Bonferroni: then the chance that *any* interval of the run, at any look, misses is at most
alpha, whatever stops the measuring and however the series hang together. Holm's steps would be
sharper for tests, but do not give intervals that hold together, depend on which series were dropped
before, and gain next to nothing where most series are unchanged. A look with too few pairs to
decide at its alpha cannot err: it is left out, and its share goes to the others.

**Confirmation.** What looks like a regression is measured anew from nothing in a new process, where
the allocations are others. Only what is a regression both times is one. Improvements are notices,
and need no second run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UsageError
from .signed_rank import fewest, signed_rank_interval
from .verdicts import Interval, Verdict

Pair = tuple[float, float]
Measure = Callable[[Sequence[str]], Mapping[str, Pair]]
"""Measures old and new of each named series once, interleaved; the order is its own affair."""


@dataclass(frozen=True, slots=True)
class SeriesSpec:
    """What is asked of one series.

    Attributes:
        better: which way is good.
        threshold: the fraction of slow-down that must be found; None: the rule's.
    """

    better: Literal["lower", "higher"] = "lower"
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """How sure a verdict must be, and what may be spent on it.

    Attributes:
        threshold: the fraction of slow-down that must be found, for series that name none.
        alpha: the chance that any interval of one run misses, all series and looks together.
        looks: numbers of rounds after which the pairs are looked at, ascending.

    Raises:
        UsageError: a threshold or alpha outside (0, 1), or looks that do not ascend.
    """

    threshold: float = 0.02
    alpha: float = 0.01
    looks: tuple[int, ...] = (12, 20, 32, 48, 72)

    def __post_init__(self) -> None:
        for name in ("threshold", "alpha"):
            if not 0 < (value := getattr(self, name)) < 1:
                raise _misuse(name, "a fraction between 0 and 1", str(value))
        if not self.looks or list(self.looks) != sorted({n for n in self.looks if n > 0}):
            raise _misuse("looks", "ascending numbers of rounds", str(self.looks))

    def plan(self, family: int) -> tuple[tuple[int, ...], float]:
        """The looks that can decide, and the alpha of each interval, for so many series.

        Raises:
            UsageError: even the last look has too few pairs.
        """
        for start, look in enumerate(self.looks):
            looks = self.looks[start:]
            alpha = self.alpha / (max(1, family) * len(looks))
            if look >= fewest(alpha):
                return looks, alpha
        needed = fewest(self.alpha / max(1, family))
        raise _misuse("looks", f"one of {needed} rounds for {family} series", str(self.looks))


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of one series.

    Attributes:
        verdict: the outcome.
        ratio: new over old as measured (not turned), with the interval that was judged; of the
            second run where there was one, which no selection has biased. None: no pairs.
        rounds: pairs measured, both runs together.
        old, new: medians over the pairs that `ratio` is of, in the unit of the measurement.
        note: why, where the verdict alone does not say.
    """

    verdict: Verdict
    ratio: Interval | None
    rounds: int
    old: float | None
    new: float | None
    note: str = ""


@dataclass
class RuleState:
    """All that a run of the rule knows: enough to go on in another process.

    Attributes:
        rule: what it was started with; it cannot change on the way.
        phase: the run that is under way.
        first, second: the pairs by series; in `second` the suspects alone.
    """

    rule: Rule
    phase: Literal["first", "second", "done"] = "first"
    first: dict[str, list[Pair]] = field(default_factory=dict)
    second: dict[str, list[Pair]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data that `json` writes."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RuleState:
        """The state that `as_json` gave.

        Raises:
            UsageError: data of another shape.
        """
        try:
            rule = Rule(**{**data["rule"], "looks": tuple(data["rule"]["looks"])})
            if (phase := data["phase"]) not in ("first", "second", "done"):
                raise ValueError(f"phase {phase!r}")
            first, second = (
                {name: [(float(a), float(b)) for a, b in pairs] for name, pairs in runs.items()}
                for runs in (data["first"], data["second"])
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _misuse("state", "the state of a run of the rule", repr(error)) from error
        return cls(rule, phase, first, second)


def outcomes(
    low: ArrayLike, high: ArrayLike, threshold: ArrayLike
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Where an interval says regression, improvement, no change; at most one of the three.

    Args:
        low, high: ends of the interval of the *logarithm* of the ratio, more than 0 being worse.
        threshold: the fraction of slow-down that must be found; all three broadcast.
    """
    low, high, t = (np.asarray(a, dtype=np.float64) for a in (low, high, threshold))
    dead, edge = np.log1p(t / 2), np.log1p(t)
    regression, improvement = low > dead, high < -dead
    same = (low > -edge) & (high < edge) & ~regression & ~improvement
    return regression, improvement, same


def run_rule(
    series: Mapping[str, SeriesSpec],
    measure: Measure,
    rule: Rule,
    *,
    confirm: Callable[[], Measure] | None = None,
    out_of_budget: Callable[[], bool] = lambda: False,
    state: RuleState | None = None,
    on_round: Callable[[RuleState], None] = lambda state: None,
) -> dict[str, Decision]:
    """Measure round by round until every series is decided, or the budget is spent.

    Args:
        series: what is watched.
        measure: gives one pair of each series it is asked for.
        rule: when a difference is one.
        confirm: starts the second run and gives its `measure`; called only where there are
            suspects. Without it a regression of one run stands, and the note says so.
        out_of_budget: asked before each round. At its end the next look is taken at once: the clock
            knows nothing of the signs, so that this look is as valid as the one it stands for.
        state: of a run that was interrupted; it is continued, and changed.
        on_round: called with the state after each round and each change of phase, to keep it.

    Raises:
        UsageError: no series; a state of another rule or other series; a measurement that is
            missing, not finite or not positive, with the name of the series.
    """
    state = _started(series, rule, state)
    if state.phase == "first":
        _measure_run(_Run(series, rule, state.first), measure, out_of_budget, state, on_round)
        suspects = _suspects(series, rule, state.first)
        state.phase = "second" if suspects and confirm is not None else "done"
        state.second = {name: [] for name in suspects} if state.phase == "second" else {}
        on_round(state)
    if state.phase == "second":
        run = _Run(series, rule, state.second)
        if confirm is not None and not out_of_budget() and run.open():
            _measure_run(run, confirm(), out_of_budget, state, on_round)
        state.phase = "done"
        on_round(state)
    return _decisions(series, rule, state)


def _started(series: Mapping[str, SeriesSpec], rule: Rule, state: RuleState | None) -> RuleState:
    if not series:
        raise _misuse("series", "one series at least", "none")
    if state is None or not state.first:
        state = state or RuleState(rule)
        state.first = {name: [] for name in series}
    if state.rule != rule:
        raise _misuse("rule", f"that of the interrupted run, {state.rule}", str(rule))
    if differing := sorted(set(state.first) ^ set(series)):
        raise _misuse("series", "those of the interrupted run", f"others: {', '.join(differing)}")
    return state


class _Run:
    """The pairs of one run beside the looks and the alpha of its family."""

    def __init__(
        self, series: Mapping[str, SeriesSpec], rule: Rule, pairs: dict[str, list[Pair]]
    ) -> None:
        self.series, self.rule, self.pairs = series, rule, pairs
        self.looks, self.alpha = rule.plan(len(pairs))

    def open(self) -> list[str]:
        """The series that another round may decide."""
        return [name for name in self.pairs if self._goes_on(name)]

    def _goes_on(self, name: str) -> bool:
        rounds = len(self.pairs[name])
        if rounds >= self.looks[-1]:
            return False
        return rounds not in self.looks or self.verdict(name) is Verdict.UNDECIDABLE

    def interval(self, name: str) -> Interval | None:
        """Of the logarithm of new over old."""
        if not self.pairs[name]:
            return None
        old, new = np.log(np.array(self.pairs[name])).T
        return signed_rank_interval(new - old, self.alpha)

    def verdict(self, name: str) -> Verdict:
        if (interval := self.interval(name)) is None:
            return Verdict.UNDECIDABLE
        spec = self.series[name]
        low, high = interval.low, interval.high
        if spec.better == "higher":
            low, high = -high, -low
        threshold = self.rule.threshold if spec.threshold is None else spec.threshold
        found = (Verdict.REGRESSION, Verdict.IMPROVEMENT, Verdict.NO_CHANGE)
        for verdict, holds in zip(found, outcomes(low, high, threshold), strict=True):
            if holds:
                return verdict
        return Verdict.UNDECIDABLE

    def decision(self, name: str) -> Decision:
        log, pairs = self.interval(name), self.pairs[name]
        if log is None:
            return Decision(Verdict.UNDECIDABLE, None, 0, None, None, "out of budget: no pairs")
        old, new = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = Interval(math.exp(log.value), math.exp(log.low), math.exp(log.high))
        verdict, note = self.verdict(name), ""
        if verdict is Verdict.UNDECIDABLE:
            spent = "the last look" if len(pairs) >= self.looks[-1] else "out of budget"
            note = f"{_words(ratio)} after {len(pairs)} rounds ({spent})"
        return Decision(verdict, ratio, len(pairs), old, new, note)


def _measure_run(
    run: _Run,
    measure: Measure,
    out_of_budget: Callable[[], bool],
    state: RuleState,
    on_round: Callable[[RuleState], None],
) -> None:
    names = run.open()
    while names and not out_of_budget():
        measured = measure(names)
        # All are checked before any is kept: a round is whole or did not happen.
        pairs = {name: _checked(name, measured) for name in names}
        for name, pair in pairs.items():
            run.pairs[name].append(pair)
        on_round(state)
        names = run.open()


def _checked(name: str, measured: Mapping[str, Pair]) -> Pair:
    if name not in measured:
        raise _misuse(f"series {name}", "a pair (old, new)", "none in this round")
    old, new = (float(value) for value in measured[name])
    if not (0 < old < math.inf and 0 < new < math.inf):
        raise _misuse(f"series {name}", "finite positive measurements", f"({old}, {new})")
    return old, new


def _suspects(
    series: Mapping[str, SeriesSpec], rule: Rule, pairs: dict[str, list[Pair]]
) -> list[str]:
    run = _Run(series, rule, pairs)
    return [name for name in pairs if run.verdict(name) is Verdict.REGRESSION]


def _decisions(
    series: Mapping[str, SeriesSpec], rule: Rule, state: RuleState
) -> dict[str, Decision]:
    first = _Run(series, rule, state.first)
    decided = {name: first.decision(name) for name in series}
    second = _Run(series, rule, state.second)
    for name, once in decided.items():
        if name in state.second:
            decided[name] = _confirmed(once, second.decision(name))
        elif once.verdict is Verdict.REGRESSION:
            decided[name] = _noted(once, once.verdict, "one run only", once.rounds)
    return decided


def _confirmed(once: Decision, again: Decision) -> Decision:
    """Both runs in one: a regression only where both are, and honest about what is between."""
    was = f"first run {_words(once.ratio)}"
    rounds = once.rounds + again.rounds
    if again.verdict is Verdict.REGRESSION:
        return _noted(again, again.verdict, f"confirmed: {was}", rounds)
    if again.ratio is None:
        note = f"suspected, not confirmed: out of budget; {was}"
        return _noted(once, Verdict.UNDECIDABLE, note, rounds)
    if again.verdict is Verdict.NO_CHANGE:
        return _noted(again, again.verdict, f"not confirmed: {was}", rounds)
    # Worse once and better or open the second time: the two runs contradict each other.
    note = f"not confirmed: {was}, second run {_words(again.ratio)}"
    return _noted(again, Verdict.UNDECIDABLE, note, rounds)


def _noted(decision: Decision, verdict: Verdict, note: str, rounds: int) -> Decision:
    return Decision(verdict, decision.ratio, rounds, decision.old, decision.new, note)


def _words(ratio: Interval | None) -> str:
    if ratio is None:
        return "no ratio"
    return f"×{ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"


def _misuse(culprit: str, expected: str, found: str) -> UsageError:
    remedy = "Correct it, or start the comparison anew."
    return UsageError(culprit, expected=expected, found=found, remedy=remedy)

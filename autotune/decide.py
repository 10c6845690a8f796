"""Which of the measured configs is chosen: the same one again, if only noise has changed.

The finalists are timed anew, interleaved round by round, and the logarithms of the ratios within a
round are judged by their signed-rank intervals. Two things are asked:

    in the default's numerics class   how much slower than the fastest of this class?
                                      low > 1 + band: out;  high < 1 + band: tied;  else: go on
    of another class                  how much faster than the one that would be taken?
                                      low > 1 + leave: wins;  high < 1 + leave: out;  else: go on

What is still open after the last look is tied, or has not won. Where nobody wins, the choice is
among the tied of the default's class: the default, then the best by the prior, then the first in
canonical order. Where somebody wins, it is among the winners that are tied with the fastest one, in
the same order.

So speed decides only beyond the band, and everything within it is decided by what does not depend
on time. Two processes of one device still differ by some 0.3% in what they find, however long they
measure: their operands lie elsewhere. A config near the end of a band would fall on either side of
it. So a band ends where nobody is near, in the widest gap between the estimates (margin.py), within
bounds. Timings decide alone: the clock is asked when to stop, never which to take. What is chosen
has an estimate at or below the default's, of the same rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import median
from typing import Any

from ..errors import UsageError
from .config import Config
from .margin import widest_margin
from .outcome import Outcome
from .rule import Rule
from .signed_rank import signed_rank_interval
from .tunable import Tunable
from .verdicts import Interval

Measure = Callable[[Sequence[Config]], Mapping[Config, float]]
"""One round: seconds of each config, in this order; those that failed are missing."""


@dataclass(frozen=True, slots=True)
class DecisionRule:
    """How sure a choice must be, and what may be spent on it.

    Attributes:
        band: the fraction of time within which configs of one class are tied, at least and most.
        leave: how much faster another class must be than what would be taken of the default's, at
            least and most.
        finalist_band: how much slower than the best, by the first measurement, a finalist may be.
        finalists: at most; the default and the best of its class are always there.
        alpha: the chance that any interval of the decision misses, two-sided.
        looks: numbers of rounds after which the intervals are looked at, ascending.
    """

    band: tuple[float, float] = (0.01, 0.02)
    leave: tuple[float, float] = (0.03, 0.04)
    finalist_band: float = 0.05
    finalists: int = 10
    alpha: float = 0.05
    looks: tuple[int, ...] = (12, 20, 32, 48)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided.

    Attributes:
        config: to be used.
        numerics: its class.
        seconds: median of its times in the decision; None: nothing was measured.
        default: the tunable's.
        default_seconds: median of its times; None where it was not measured or does not work.
        ratio: of the choice's time to the default's, with its interval; None: no pairs, or the
            choice is the default.
        tied: the configs that are as good as the choice, canonical order, itself included.
        runners_up: the other finalists and the seconds of each, the fastest first.
        dropped: finalists that failed as they were timed again.
        rounds: of the decision; 0: it rests on the first measurement.
        reason: why this one, in words.
    """

    config: Config
    numerics: str
    seconds: float | None
    default: Config
    default_seconds: float | None
    ratio: Interval | None
    tied: tuple[Config, ...]
    runners_up: tuple[tuple[Config, float], ...]
    dropped: tuple[Config, ...]
    rounds: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain data that `json` writes."""
        ratio = self.ratio
        return {
            "config": self.config.to_json(),
            "numerics": self.numerics,
            "seconds": self.seconds,
            "default": self.default.to_json(),
            "default_seconds": self.default_seconds,
            # Ends may be infinite, which JSON does not know.
            "ratio": None if ratio is None else [str(x) for x in astuple(ratio)],
            "tied": [config.to_json() for config in self.tied],
            "runners_up": [[config.to_json(), seconds] for config, seconds in self.runners_up],
            "dropped": [config.to_json() for config in self.dropped],
            "rounds": self.rounds,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """The choice that `to_json` gave, on this machine or another.

        Raises:
            UsageError: data of another shape.
        """
        read = Config.from_json
        try:
            ratio = data["ratio"]
            return cls(
                config=read(data["config"]),
                numerics=str(data["numerics"]),
                seconds=data["seconds"],
                default=read(data["default"]),
                default_seconds=data["default_seconds"],
                ratio=None if ratio is None else Interval(*(float(x) for x in ratio)),
                tied=tuple(read(config) for config in data["tied"]),
                runners_up=tuple((read(c), float(seconds)) for c, seconds in data["runners_up"]),
                dropped=tuple(read(config) for config in data["dropped"]),
                rounds=int(data["rounds"]),
                reason=str(data["reason"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                "choice",
                expected="what Choice.to_json gives",
                found=repr(error),
                remedy="Start the study anew.",
            ) from error


def untried(tunable: Tunable, reason: str) -> Choice:
    """The default, where nothing was measured, or nothing that was works."""
    default = tunable.default
    return Choice(
        config=default,
        numerics=tunable.numerics(default),
        seconds=None,
        default=default,
        default_seconds=None,
        ratio=None,
        tied=(default,),
        runners_up=(),
        dropped=(),
        rounds=0,
        reason=f"the default: {reason}",
    )


def choose(
    tunable: Tunable,
    measure: Measure,
    candidates: Sequence[Outcome],
    rule: DecisionRule | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Choice:
    """Time the finalists again, and decide.

    Args:
        tunable: knows the default, the classes, the prior, the canonical order.
        measure: times each finalist that is still open, once.
        candidates: all that was tried; only those that are ok count.
        rule: how sure.
        stop: asked before each round. Where it stops before the first look, the decision rests on
            the rounds of the first measurement.
    """
    rule = rule or DecisionRule()
    good = {outcome.config: outcome for outcome in candidates if outcome.ok}
    if not good:
        reason = "nothing that was tried works" if candidates else "nothing was measured"
        return untried(tunable, reason)
    base = _reference(tunable, good)
    finalists = _finalists(tunable, good, base, rule)
    table = _Table(tunable, base, rule, {config: {} for config in finalists})
    if len(finalists) == 1 or not _race(table, measure, stop):
        table = table.of_first(good)
    return _choice(table, good, tuple(c for c in finalists if c not in table.logs))


def _reference(tunable: Tunable, good: Mapping[Config, Outcome]) -> Config:
    """The default, or what candidates were raced against in its stead."""
    if tunable.default in good:
        return tunable.default
    alone = [config for config, outcome in good.items() if not outcome.reference]
    return min(alone or good, key=tunable.space.index)


def _finalists(
    tunable: Tunable, good: Mapping[Config, Outcome], base: Config, rule: DecisionRule
) -> tuple[Config, ...]:
    """The best by the first measurement, beside the default and the best of its class."""
    ratios = {c: o.ratio for c, o in good.items() if o.ratio is not None and not o.stopped}
    ranked = sorted(ratios, key=lambda c: (ratios[c], tunable.space.index(c)))
    home = [c for c in ranked if tunable.numerics(c) == tunable.numerics(base)]
    near = [
        config
        for group in (ranked, home)
        for config in group
        if ratios[config] <= ratios[group[0]] * (1 + rule.finalist_band)
    ]
    wanted = list(dict.fromkeys([base, *home[:1], *near]))[: max(2, rule.finalists)]
    return tuple(sorted(wanted, key=tunable.space.index))


def _race(table: _Table, measure: Measure, stop: Callable[[], bool]) -> bool:
    """Time round by round until all is sure; whether a look was reached."""
    looks, _ = table.plan()
    done, asked = 0, list(table.logs)
    while done < looks[-1] and asked and not stop():
        # Rotated, so that each has each place.
        turn = asked[done % len(asked) :] + asked[: done % len(asked)]
        found = measure(turn)
        if table.base not in found:
            return False  # nothing to compare with: more likely the device than the default
        for config in turn:
            if config not in found:
                del table.logs[config]
                asked.remove(config)
        if len(found) < len(turn):
            continue  # a round is whole or did not happen
        table.add(done, found)
        done += 1
        if done in looks:
            asked = table.unfinished()
    return done >= looks[0]


@dataclass(frozen=True, slots=True)
class _Judged:
    """Where the finalists stand.

    Attributes:
        home: the fastest of the default's class.
        able: those that may be chosen.
        won: whether they are of another class.
        band: the fraction within which they are tied.
        unsure: those that more rounds may move.
    """

    home: Config
    able: tuple[Config, ...]
    won: bool
    band: float
    unsure: frozenset[Config]


@dataclass
class _Table:
    """Logarithms of seconds, by config and round; what is out has fewer rounds than the base."""

    tunable: Tunable
    base: Config
    rule: DecisionRule
    logs: dict[Config, dict[int, float]]
    first: bool = False

    def __post_init__(self) -> None:
        self.family = len(self.logs)

    def of_first(self, good: Mapping[Config, Outcome]) -> _Table:
        """The rounds of the first measurement, as ratios to the base: each has its own pairs."""
        logs = {c: dict(enumerate(good[c].log_ratios)) for c in self.logs}
        most = max(len(row) for row in logs.values()) if logs else 0
        logs[self.base] = dict.fromkeys(range(most), 0.0)
        return _Table(self.tunable, self.base, self.rule, logs, first=True)

    def add(self, number: int, found: Mapping[Config, float]) -> None:
        """Keep a round."""
        for config, seconds in found.items():
            self.logs[config][number] = math.log(seconds)

    @property
    def rounds(self) -> int:
        """Of the base, which is in all of them."""
        return len(self.logs[self.base])

    def plan(self) -> tuple[tuple[int, ...], float]:
        """The looks, and the alpha of each interval, by the union bound of rule.py. Few rounds, of
        the first measurement, could decide nothing by that bound: there each has all of it.
        """
        if self.first:
            return self.rule.looks, self.rule.alpha
        return Rule(alpha=self.rule.alpha, looks=self.rule.looks).plan(self.family)

    def unfinished(self) -> list[Config]:
        """Who is timed again: what is unsure, and what that is compared with."""
        judged = self.judged()
        if not judged.unsure:
            return []
        needed = {*judged.unsure, self.base, judged.home, *judged.able}
        return [config for config in self.logs if config in needed]

    def judged(self) -> _Judged:
        """Where the finalists stand, by the rounds so far."""
        numerics, low, high = self.tunable.numerics, *map(math.log1p, self.rule.leave)
        home = [c for c in self.logs if numerics(c) == numerics(self.base)]
        best = self._fastest(home)
        tied, unsure, band = self._within_band(home, best)
        stay = self.preferred(tied)
        wins = {c: self.ratio(stay, c) for c in self.logs if c not in home}
        edge = widest_margin([win.value for win in wins.values()], low, high) if wins else high
        winners = [c for c, win in wins.items() if win.low > edge]
        open_ones = {c for c, win in wins.items() if win.low <= edge <= win.high}
        if not winners:
            return _Judged(best, tuple(tied), False, band, frozenset(unsure | open_ones))
        # The win is sure: who is the fastest at home does not matter any more.
        able, unsure, band = self._within_band(winners, self._fastest(winners))
        return _Judged(best, tuple(able), True, band, frozenset(unsure | open_ones))

    def preferred(self, able: Sequence[Config]) -> Config:
        """Which of the tied is taken."""
        # Never slower than the default: an estimate above it would have been let through as tied.
        pool = [c for c in able if c == self.base or self.ratio(c, self.base).value < 0]
        return min(pool or [self.base], key=lambda c: _preference(self.tunable, c))

    def _within_band(
        self, group: list[Config], best: Config
    ) -> tuple[list[Config], set[Config], float]:
        """Those that are not surely slower than the best, those of whom nothing is sure, and the
        band.
        """
        slower = {c: self.ratio(c, best) for c in group if c != best}
        low, high = map(math.log1p, self.rule.band)
        edge = widest_margin([0.0, *(interval.value for interval in slower.values())], low, high)
        out = {c for c, interval in slower.items() if interval.low > edge}
        unsure = {c for c, interval in slower.items() if c not in out and interval.high >= edge}
        return [c for c in group if c not in out], unsure, math.expm1(edge)

    def _fastest(self, group: list[Config]) -> Config:
        """By estimate, among those that are still timed."""
        alive = [c for c in group if len(self.logs[c]) == self.rounds]
        index = self.tunable.space.index
        return min(alive or group, key=lambda c: (self.ratio(c, self.base).value, index(c)))

    def ratio(self, config: Config, to: Config) -> Interval:
        """The logarithm of the ratio of two times, over the rounds that have both."""
        a, b = self.logs[config], self.logs[to]
        rounds = sorted(a.keys() & b.keys())
        if config == to or not rounds:
            return Interval(0.0, -math.inf, math.inf)
        return signed_rank_interval([a[n] - b[n] for n in rounds], self.plan()[1])


def _choice(table: _Table, good: Mapping[Config, Outcome], dropped: tuple[Config, ...]) -> Choice:
    tunable, base = table.tunable, table.base
    judged = table.judged()
    config = table.preferred(judged.able)
    seconds = {c: _seconds(c, table, good) for c in table.logs}
    others = sorted((s, tunable.space.index(c), c) for c, s in seconds.items() if c != config)
    log = table.ratio(config, base)
    ratio = Interval(math.exp(log.value), math.exp(log.low), math.exp(log.high))
    return Choice(
        config=config,
        numerics=tunable.numerics(config),
        seconds=seconds[config],
        default=tunable.default,
        default_seconds=seconds.get(tunable.default),
        ratio=None if config == base or not table.rounds else ratio,
        tied=tuple(sorted({*judged.able, config}, key=tunable.space.index)),
        runners_up=tuple((c, s) for s, _, c in others),
        dropped=dropped,
        rounds=0 if table.first else table.rounds,
        reason=_reason(config, table, judged),
    )


def _preference(tunable: Tunable, config: Config) -> tuple[bool, bool, float, int]:
    """What decides between the tied: the smallest is chosen."""
    return (
        tunable.numerics(config) != tunable.numerics(tunable.default),
        config != tunable.default,
        tunable.prior(config),
        tunable.space.index(config),
    )


def _seconds(config: Config, table: _Table, good: Mapping[Config, Outcome]) -> float:
    if table.first:
        return good[config].median or math.inf
    return math.exp(median(table.logs[config].values()))


def _reason(config: Config, table: _Table, judged: _Judged) -> str:
    """Why this one, in words."""
    band, tunable = f"{judged.band:.1%}", table.tunable
    if config == table.base:
        name = "the default" if config == tunable.default else "what works in the default's stead"
        alone = len(table.logs) == 1
        why = "nothing else came near" if alone else f"nothing is surely faster by {band}"
    elif judged.won:
        name = "another numerics class"
        why = f"surely faster by {table.rule.leave[0]:.0%} or more"
    else:
        name, why = "faster than the default", f"which is more than {band} behind"
    others = len({*judged.able} - {config})
    tied = f"; tied with {others} others, and before them in order" if others else ""
    early = "; by the first measurement alone" if table.first and len(table.logs) > 1 else ""
    return f"{name}: {why}{tied}{early}"

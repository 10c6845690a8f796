"""How often rules for speed regressions cry wolf, and how often they sleep.

    python benchmarks/bench_regress.py [--noise FILE | --synthetic] [--runs 2000] [--json]

Runs of a suite are resampled from recorded noise: pairs of the same code, measured interleaved on
one GPU in many sessions, each a process of its own. A run takes one session for all its series, so
that what they have in common stays, and a moving-block bootstrap of its pairs, the same blocks for
all series, so that what lasts over a few pairs stays. The second run of a rule takes another
session. A planted change multiplies the new times of one random series.

The second part lets one series creep by half a percent a week, and asks in which week the history
of nightly runs tells.

The bounds (Clopper & Pearson, 1934; one-sided, 95%) are those of the resampling: they cannot know
of sessions that are unlike all recorded ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.autotune.history import History, HistoryEntry, HistoryRule, Point, judge_history
from tilewright.autotune.rule import Rule, outcomes
from tilewright.autotune.signed_rank import signed_rank_intervals
from tilewright.autotune.verdicts import Verdict
from tilewright.compiler.regress.timing.session import RULE
from tilewright.errors import TilewrightError, UsageError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from regress_bounds import upper_bound  # noqa: E402  (needs the path above)
from regress_noise import (  # noqa: E402  (needs the path above)
    Floats,
    Ints,
    Noise,
    SeriesNoise,
    Suites,
    describe,
    read_noise,
    synthetic_noise,
)

Bools = NDArray[np.bool_]

NOISE = Path(__file__).parent / "results" / "regress-noise-h100.jsonl"
FACTORS = (1.01, 1.02, 1.03, 1.05, 1.10)
SAMPLES = 30  # pairs that the usual rules look at
OURS = "tilewright"
UNDECIDED, SAME, BETTER, WORSE = range(4)


def decide(
    logs: Floats, thresholds: Floats, looks: Sequence[int], alpha: float
) -> tuple[Ints, Ints]:
    """One run of our rule over [k, rounds]: codes and rounds, [k]; `run_rule` at the same looks."""
    codes = np.full(len(logs), UNDECIDED)
    rounds = np.full(len(logs), looks[-1])
    open_rows = np.arange(len(logs))
    for look in looks:
        _, low, high = signed_rank_intervals(logs[open_rows, :look], alpha)
        found = outcomes(low, high, thresholds[open_rows])
        for code, holds in zip((WORSE, BETTER, SAME), found, strict=True):
            codes[open_rows[holds]] = code
            rounds[open_rows[holds]] = look
        open_rows = open_rows[~np.any(found, axis=0)]
        if len(open_rows) == 0:
            break
    return codes, rounds


class Ours:
    """Our rule on many runs at once: all series without a change first, then a changed one each."""

    def __init__(self, first: Suites, second: Suites, rule: Rule) -> None:
        self.first, self.second, self.rule = first, second, rule
        noise = first.noise
        self.thresholds = noise.thresholds
        runs, family = len(first.session), len(noise.series)
        self.looks, self.alpha = rule.plan(family)
        run, series = (i.ravel() for i in np.indices((runs, family)))
        parts = [
            self._first(run[k], series[k], 0.0) for k in np.array_split(np.arange(len(run)), 32)
        ]
        codes, rounds = (
            np.concatenate(part).reshape(runs, family) for part in zip(*parts, strict=True)
        )
        self.codes, self.rounds = codes, rounds

    def _first(self, run: Ints, series: Ints, change: float) -> tuple[Ints, Ints]:
        logs = self.first.log_ratios(run, series, self.looks[-1]) + change
        return decide(logs, self.thresholds[series], self.looks, self.alpha)

    def _second(self, suspects: Bools, change: Floats) -> tuple[Bools, Ints]:
        """The suspects that are confirmed, and the rounds of it, [runs, series]."""
        confirmed = np.zeros_like(suspects)
        rounds = np.zeros(suspects.shape, dtype=np.intp)
        family = suspects.sum(axis=1)
        for size in np.unique(family[family > 0]):
            looks, alpha = self.rule.plan(int(size))
            run, series = np.nonzero(suspects & (family == size)[:, None])
            logs = self.second.log_ratios(run, series, looks[-1]) + change[run, series][:, None]
            codes, spent = decide(logs, self.thresholds[series], looks, alpha)
            confirmed[run, series] = codes == WORSE
            rounds[run, series] = spent
        return confirmed, rounds

    def run(self, planted: Ints | None = None, factor: float = 1.0) -> tuple[Bools, Floats]:
        """What is called a regression, [runs, series], and the GPU seconds, [runs].

        Args:
            planted: [runs], the series that is changed in each; None: no change.
            factor: by which its new times are multiplied.
        """
        codes, rounds = self.codes.copy(), self.rounds.copy()
        change = np.zeros(codes.shape)
        if planted is not None:
            run = np.arange(len(codes))
            change[run, planted] = math.log(factor)
            codes[run, planted], rounds[run, planted] = self._first(run, planted, math.log(factor))
        suspects = codes == WORSE
        confirmed, again = self._second(suspects, change)
        noise = self.first.noise
        seconds = (rounds + again) @ noise.round_seconds
        start = float(noise.header.get("start_seconds", 0.0))
        restart = float(noise.header.get("confirm_seconds", start))
        return confirmed, seconds + start + suspects.any(axis=1) * restart


def mann_whitney_p(old: Floats, new: Floats) -> Floats:
    """One-sided p-values of new being larger than old, [rows], of [rows, n] and [rows, m].

    By the normal distribution with ties and continuity corrected (Mann & Whitney, 1947), which is
    good from about eight values a side on.
    """
    n, m = old.shape[1], new.shape[1]
    pairs = new[:, :, None], old[:, None, :]
    u = np.greater(*pairs).sum(axis=(1, 2)) + np.equal(*pairs).sum(axis=(1, 2)) / 2
    pooled = np.concatenate([old, new], axis=1)
    ties = (pooled[:, :, None] == pooled[:, None, :]).sum(axis=2)  # of each value, itself included
    total = n + m
    variance = n * m / 12 * (total + 1 - (ties**2 - 1.0).sum(axis=1) / (total * (total - 1)))
    z = (u - n * m / 2 - 0.5) / np.sqrt(np.maximum(variance, 1e-300))
    return np.array([math.erfc(x / math.sqrt(2)) / 2 for x in z])


class Usual:
    """The usual rules, on one run's first pairs; two-in-a-row looks at a second run as well.

    As they are mostly used, they compare with the times that a baseline run stored; here also with
    interleaved ones, which is more than most can.
    """

    NAMES = (
        "fixed 5% of medians",
        "fixed 10% of medians",
        "Mann-Whitney 0.05, factor 1.1",
        "5% two in a row",
    )

    def __init__(self, first: Suites, second: Suites, stored: Suites | None) -> None:
        self.first, self.second, self.stored = first, second, stored

    def run(self, run: Ints, series: Ints, factor: float) -> dict[str, Bools]:
        """What each rule calls a regression, [k], of k (run, series) with the new times changed."""
        old, new = self.first.times(run, series, SAMPLES)
        again_old, again_new = self.second.times(run, series, SAMPLES)
        if self.stored:
            old, _ = self.stored.times(run, series, SAMPLES)
            again_old = old
        ratio = factor * np.median(new, axis=1) / np.median(old, axis=1)
        again = factor * np.median(again_new, axis=1) / np.median(again_old, axis=1)
        ranked = ratio > 1.1
        ranked[ranked] = mann_whitney_p(old[ranked], factor * new[ranked]) < 0.05
        found = (ratio > 1.05, ratio > 1.10, ranked, (ratio > 1.05) & (again > 1.05))
        return dict(zip(self.NAMES, found, strict=True))


@dataclass(frozen=True)
class RuleResult:
    """One rule over all runs.

    Attributes:
        name: of the rule.
        runs: of the suite, without a change and with each.
        false_alarms: runs without a change in which any series was called a regression.
        detected: runs in which the changed series was, by factor.
        seconds: of GPU, mean and 99th percentile without a change; None: not counted.
        seconds_changed: the same with a change of 3%.
    """

    name: str
    runs: int
    false_alarms: int
    detected: Mapping[float, int]
    seconds: tuple[float, float] | None = None
    seconds_changed: tuple[float, float] | None = None

    @property
    def false_alarm_bound(self) -> float:
        """95% upper bound of the chance of a false alarm a run."""
        return upper_bound(self.false_alarms, self.runs)


def _candidates(noise: Noise, plant_in: str) -> Ints:
    """Indices of the series whose name holds a text."""
    found = np.array([i for i, name in enumerate(noise.series) if plant_in in name])
    if len(found) == 0:
        raise UsageError(
            "--plant-in", expected="a part of a series' name", found=plant_in,
            remedy=f"There are: {', '.join(noise.series)}.",
        )  # fmt: skip
    return found


def sensitivity(
    noise: Noise, runs: int, rule: Rule, seed: int = 0, plant_in: str = ""
) -> list[RuleResult]:
    """False alarms and detections of our rule, and of the usual ones on interleaved, stored times.

    Args:
        noise: to resample.
        runs: of the suite, for no change and for each factor.
        rule: ours.
        seed: of the resampling.
        plant_in: only series whose name holds this are changed.
    """
    rng = np.random.default_rng(seed)
    rounds = max(rule.looks[-1], SAMPLES)
    first = Suites.draw(noise, runs, rounds, rng)
    second = Suites.draw(noise, runs, rounds, rng, other_than=first.session)
    stored = Suites.draw(noise, runs, rounds, rng, other_than=first.session)
    candidates = _candidates(noise, plant_in)
    planted = rng.choice(candidates, runs)
    return [
        _ours(Ours(first, second, rule), planted),
        *_usual(Usual(first, second, None), planted, len(noise.series)),
        *_usual(Usual(first, second, stored), planted, len(noise.series)),
    ]


def _ours(ours: Ours, planted: Ints) -> RuleResult:
    run = np.arange(len(planted))
    found, seconds = ours.run()
    changed = {factor: ours.run(planted, factor) for factor in FACTORS}
    return RuleResult(
        OURS,
        len(run),
        int(found.any(axis=1).sum()),
        {factor: int(hit[run, planted].sum()) for factor, (hit, _) in changed.items()},
        _spread(seconds),
        _spread(changed[1.03][1]),
    )


def _spread(seconds: Floats) -> tuple[float, float]:
    return float(seconds.mean()), float(np.percentile(seconds, 99))


def _usual(usual: Usual, planted: Ints, family: int) -> list[RuleResult]:
    runs = len(planted)
    run = np.arange(runs)
    false = {name: np.zeros(runs, dtype=bool) for name in usual.NAMES}
    for series in range(family):
        for name, found in usual.run(run, np.full(runs, series), 1.0).items():
            false[name] |= found
    hits = {factor: usual.run(run, planted, factor) for factor in FACTORS}
    return [
        RuleResult(
            f"{name}{', stored' if usual.stored else ''}",
            runs,
            int(false[name].sum()),
            {factor: int(found[name].sum()) for factor, found in hits.items()},
        )
        for name in usual.NAMES
    ]


@dataclass(frozen=True)
class DriftResult:
    """What the history told of a creeping series.

    Attributes:
        weekly: the creep, as a fraction.
        weeks, quiet_weeks: how long it creeps, after how long without.
        found_in_week: of each creeping series the week in which the history told, from 1; 0: never.
        false_alarms, quiet_histories: of histories of that length that do not creep, each a series.
        step_alarms, steps: of the gate, on single steps of a whole week's creep.
    """

    weekly: float
    weeks: int
    quiet_weeks: int
    found_in_week: tuple[int, ...]
    false_alarms: int
    quiet_histories: int
    step_alarms: int
    steps: int


def drift_experiment(
    noise: Noise,
    rule: Rule,
    *,
    histories: int = 30,
    quiet: int = 300,
    steps: int = 2000,
    weekly: float = 0.005,
    weeks: int = 12,
    quiet_weeks: int = 4,
    seed: int = 0,
    plant_in: str = "",
) -> DriftResult:
    """Lets single series creep, and asks the history each week.

    A night's value is the median of a resampled session's new times: sessions differ as the
    recorded ones do, and nothing is measured beside a pinned build, which is the hardest case.

    Args:
        noise: to resample.
        rule: the gate that each single step is held against.
        histories, quiet: histories that creep, and that do not.
        steps: single steps of a week's creep, each one run of the suite.
        weekly: creep, as a fraction.
        weeks, quiet_weeks: how long it creeps, after how long without.
        seed: of the resampling.
        plant_in: only series whose name holds this creep.
    """
    rng = np.random.default_rng(seed)
    candidates = _candidates(noise, plant_in)
    # One series at a time, at its share of the alpha of the whole suite.
    judge = HistoryRule(alpha=HistoryRule().alpha / len(noise.series))
    creep = np.maximum(0, np.arange((quiet_weeks + weeks) * 7) - quiet_weeks * 7 + 1) / 7
    kinds = ((histories, (1 + weekly) ** creep), (quiet, np.ones(len(creep))))
    found, alarms = (
        [
            _week_of_alarm(_nights(noise, levels, rng, candidates), quiet_weeks, judge)
            for _ in range(count)
        ]
        for count, levels in kinds
    )
    first = Suites.draw(noise, steps, rule.looks[-1], rng)
    second = Suites.draw(noise, steps, rule.looks[-1], rng, other_than=first.session)
    planted = rng.choice(candidates, steps)
    called, _ = Ours(first, second, rule).run(planted, 1 + weekly)
    step_alarms = int(called[np.arange(steps), planted].sum())
    quiet_alarms = sum(week > 0 for week in alarms)
    return DriftResult(
        weekly, weeks, quiet_weeks, tuple(found), quiet_alarms, quiet, step_alarms, steps
    )


def _nights(
    noise: Noise, levels: Floats, rng: np.random.Generator, candidates: Ints
) -> list[HistoryEntry]:
    """A night a level, of one random series among the candidates."""
    suites = Suites.draw(noise, len(levels), SAMPLES, rng)
    series = np.full(len(levels), rng.choice(candidates))
    _, new = suites.times(np.arange(len(levels)), series, SAMPLES)
    values = np.median(new, axis=1) * levels
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        HistoryEntry(
            (start + timedelta(days=night)).isoformat(), None, "d", {}, "s",
            {"x": Point(float(v), float(v), float(v))},
        )
        for night, v in enumerate(values)
    ]  # fmt: skip


def _week_of_alarm(nights: list[HistoryEntry], quiet_weeks: int, rule: HistoryRule) -> int:
    """The first week, after the quiet ones, at whose end the history tells; 0: none."""
    for week in range(1, len(nights) // 7 - quiet_weeks + 1):
        known = tuple(nights[: (quiet_weeks + week) * 7])
        (result,) = judge_history(History(known), "d", rule=rule, now=known[-1].when)
        if result.verdict is Verdict.REGRESSION:
            return week
    return 0


@dataclass(frozen=True)
class Report:
    """All that was found."""

    header: Mapping[str, Any]
    sessions: int
    series: int
    pairs: int
    noise: list[SeriesNoise]
    rules: list[RuleResult]
    drift: DriftResult | None
    rule: Rule = field(default_factory=Rule)


def as_text(report: Report) -> str:
    """The report as tables."""
    device = report.header.get("device", "?")
    lines = [
        f"{device}: {report.series} series, {report.sessions} sessions of {report.pairs} pairs",
        "",
        f"{'series':32} {'pair sd':>8} {'load sd':>8} {'worst':>8} {'level sd':>8} {'lag 1':>6}",
    ]
    lines += (
        f"{s.series[:32]:32} {s.pairs:8.3%} {s.sessions:8.3%} {s.worst:8.3%} "
        f"{s.levels:8.3%} {s.lag:6.2f}"
        for s in report.noise
    )
    head = "".join(f"{f'+{factor - 1:.0%}':>8}" for factor in FACTORS)
    lines += ["", f"{'rule':38} {'false alarms (95% bound)':>26} {head}   GPU s (99%), at +3%"]
    for r in report.rules:
        alarms = f"{r.false_alarms} of {r.runs} ({r.false_alarm_bound:.2%})"
        hits = "".join(f"{r.detected[factor] / r.runs:8.1%}" for factor in FACTORS)
        times = ""
        if r.seconds and r.seconds_changed:
            times = "   {:.1f} ({:.1f}), {:.1f} ({:.1f})".format(*r.seconds, *r.seconds_changed)
        lines.append(f"{r.name:38} {alarms:>26} {hits}{times}")
    return "\n".join(lines + (_drift_lines(report.drift) if report.drift else []))


def _drift_lines(drift: DriftResult) -> list[str]:
    found = sorted(week or math.inf for week in drift.found_in_week)
    last, middle = (found[-1], found[len(found) // 2]) if found else (math.inf, math.inf)
    bound = upper_bound(drift.false_alarms, drift.quiet_histories)
    return [
        "",
        f"creep of {drift.weekly:.1%} a week for {drift.weeks} weeks, "
        f"after {drift.quiet_weeks} quiet ones:",
        f"  found in {sum(w < math.inf for w in found)} of {len(found)} histories, "
        f"in week {middle} (median), {last} (last)",
        f"  the gate on a single week's step: {drift.step_alarms} of {drift.steps}",
        f"  false alarms without creep: {drift.false_alarms} of {drift.quiet_histories} "
        f"series-histories (95% bound {bound:.2%})",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments and print what came out; 0, or 2 for a misuse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noise", type=Path, default=NOISE, help="recorded noise")
    parser.add_argument("--synthetic", action="store_true", help="made-up noise instead")
    parser.add_argument("--runs", type=int, default=2000, help="of the suite, for each factor")
    parser.add_argument("--histories", type=int, default=30, help="that creep; 0: leave it out")
    parser.add_argument("--quiet-histories", type=int, default=300, help="that do not")
    parser.add_argument("--plant-in", default="", help="change series with this in their name")
    parser.add_argument("--threshold", type=float, default=None, help="for all series")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    try:
        report = _experiments(options)
    except TilewrightError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(asdict(report), indent=1) if options.json else as_text(report))
    return 0


def _experiments(options: argparse.Namespace) -> Report:
    noise = synthetic_noise(options.seed) if options.synthetic else read_noise(options.noise)
    rule = RULE  # the product's own
    if options.threshold is not None:
        rule = Rule(threshold=options.threshold)
        header = {**noise.header, "thresholds": dict.fromkeys(noise.series, options.threshold)}
        noise = Noise(header, noise.series, noise.old, noise.new)
    rules = sensitivity(noise, options.runs, rule, options.seed, options.plant_in)
    drift = None
    if options.histories:
        drift = drift_experiment(
            noise, rule, histories=options.histories, quiet=options.quiet_histories,
            steps=options.runs, seed=options.seed, plant_in=options.plant_in,
        )  # fmt: skip
    sessions, series, pairs = noise.old.shape
    return Report(noise.header, sessions, series, pairs, describe(noise), rules, drift, rule)


if __name__ == "__main__":
    sys.exit(main())

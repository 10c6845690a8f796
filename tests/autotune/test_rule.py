"""The rule of the timed tier: when it speaks, when it does not, and that it can be interrupted."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tilewright.autotune.rule import Rule, RuleState, SeriesSpec, outcomes, run_rule
from tilewright.autotune.signed_rank import critical_index, signed_rank_interval
from tilewright.autotune.verdicts import Verdict
from tilewright.errors import UsageError

RULE = Rule()


class Machine:
    """Measures with lognormal noise; `ratios` are new over old."""

    def __init__(self, ratios, noise=0.005, seed=0):
        self.ratios, self.noise = ratios, noise
        self.rng = np.random.default_rng(seed)
        self.asked = []

    def __call__(self, names):
        self.asked.append(tuple(names))
        return {name: self.pair(name) for name in names}

    def pair(self, name):
        old, new = 1e-3 * np.exp(self.rng.normal(0, self.noise, 2))
        return old, new * self.ratios[name]


def decide(ratios, *, second=None, noise=0.005, seed=0, specs=None, **options):
    specs = specs or {name: SeriesSpec() for name in ratios}
    confirm = None if second is None else lambda: Machine(second, noise, seed + 1)
    return run_rule(specs, Machine(ratios, noise, seed), RULE, confirm=confirm, **options)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (1.0, Verdict.NO_CHANGE),
        (1.006, Verdict.NO_CHANGE),  # as another allocation of the same code may be
        (1.03, Verdict.REGRESSION),
        (1.10, Verdict.REGRESSION),
        (0.95, Verdict.IMPROVEMENT),
    ],
)
def test_what_is_beyond_the_threshold_is_found_and_nothing_else(ratio, verdict):
    ratios = {"changed": ratio, **{f"same {i}": 1.0 for i in range(9)}}
    decisions = decide(ratios, second=ratios)
    assert decisions["changed"].verdict is verdict
    assert {d.verdict for name, d in decisions.items() if name != "changed"} == {Verdict.NO_CHANGE}
    interval = decisions["changed"].ratio
    assert interval.low <= ratio <= interval.high


def test_higher_is_better_turns_the_verdict_but_not_the_ratio():
    ratios = {"throughput": 0.95, "time": 0.95}
    specs = {"throughput": SeriesSpec(better="higher"), "time": SeriesSpec()}
    decisions = decide(ratios, second=ratios, specs=specs)
    assert decisions["throughput"].verdict is Verdict.REGRESSION
    assert decisions["throughput"].ratio.value == pytest.approx(0.95, abs=0.01)
    assert decisions["time"].verdict is Verdict.IMPROVEMENT


def test_a_series_may_have_a_threshold_of_its_own():
    ratios = {"strict": 1.03, "loose": 1.03}
    specs = {"strict": SeriesSpec(), "loose": SeriesSpec(threshold=0.1)}
    decisions = decide(ratios, second=ratios, specs=specs)
    assert decisions["strict"].verdict is Verdict.REGRESSION
    assert decisions["loose"].verdict is Verdict.NO_CHANGE


@pytest.mark.quick
def test_noise_too_large_for_the_looks_is_not_decidable():
    (decision,) = decide({"noisy": 1.0}, noise=0.2).values()
    assert decision.verdict is Verdict.UNDECIDABLE
    assert decision.rounds == RULE.looks[-1]
    assert "72 rounds" in decision.note


@pytest.mark.quick
def test_what_is_decided_is_measured_no_more():
    machine = Machine({"calm": 1.0, "slow": 1.5}, noise=0.001)
    run_rule({"calm": SeriesSpec(), "slow": SeriesSpec()}, machine, RULE)
    assert machine.asked == [("calm", "slow")] * 12


@pytest.mark.quick
@pytest.mark.parametrize(
    ("second", "verdict", "word"),
    [
        (1.0, Verdict.NO_CHANGE, "not confirmed"),
        (1.04, Verdict.REGRESSION, "confirmed"),
        (0.9, Verdict.UNDECIDABLE, "not confirmed"),
    ],
)
def test_a_suspect_is_measured_anew(second, verdict, word):
    fresh = Machine({"a": second}, noise=0.003, seed=5)
    first = Machine({"a": 1.05, "b": 1.0}, noise=0.003)
    specs = {"a": SeriesSpec(), "b": SeriesSpec()}
    decision = run_rule(specs, first, RULE, confirm=lambda: fresh)["a"]
    assert decision.verdict is verdict
    assert decision.note.startswith(word)
    assert decision.ratio.value == pytest.approx(second, abs=0.01)  # of the second run alone
    assert set(fresh.asked) == {("a",)}
    assert decision.rounds == len(fresh.asked) + 12


def test_a_wild_second_run_decides_nothing():
    fresh = Machine({"a": 1.0}, noise=0.2, seed=5)
    decision = run_rule(
        {"a": SeriesSpec()}, Machine({"a": 1.05}, 0.003), RULE, confirm=lambda: fresh
    )["a"]
    assert decision.verdict is Verdict.UNDECIDABLE
    assert decision.note.startswith("not confirmed")


@pytest.mark.quick
def test_without_suspects_no_second_run_is_started():
    def confirm():
        raise AssertionError("nothing to confirm")

    specs = {"same": SeriesSpec(), "faster": SeriesSpec()}
    machine = Machine({"same": 1.0, "faster": 0.9})
    verdicts = {d.verdict for d in run_rule(specs, machine, RULE, confirm=confirm).values()}
    assert verdicts == {Verdict.NO_CHANGE, Verdict.IMPROVEMENT}


def test_one_run_alone_says_that_it_is():
    assert decide({"a": 1.05})["a"].note == "one run only"


def budget(rounds):
    left = iter([False] * rounds)
    return lambda: next(left, True)


@pytest.mark.quick
def test_the_end_of_the_budget_brings_the_look_forward():
    ratios = {"clear": 1.5, "open": 1.012}
    decisions = decide(ratios, out_of_budget=budget(11), noise=0.01)
    assert decisions["clear"].verdict is Verdict.REGRESSION
    assert decisions["open"].verdict is Verdict.UNDECIDABLE
    assert "out of budget" in decisions["open"].note
    none = decide(ratios, out_of_budget=budget(0))["clear"]
    assert (none.verdict, none.ratio, none.rounds) == (Verdict.UNDECIDABLE, None, 0)


def test_a_suspect_that_nothing_is_left_for_is_not_blamed():
    decision = decide({"a": 1.05}, second={"a": 1.05}, out_of_budget=budget(12))["a"]
    assert decision.verdict is Verdict.UNDECIDABLE
    assert "suspected, not confirmed: out of budget" in decision.note


class Stop(Exception):
    pass


@pytest.mark.quick
@pytest.mark.parametrize("stop_after", [1, 12, 13, 25, 30, 33, 40])
def test_an_interrupted_run_goes_on_where_it_ended(stop_after):
    ratios = {"a": 1.016, "b": 1.05, "c": 1.0, "d": 1.011}
    specs = {name: SeriesSpec() for name in ratios}
    rounds = _recorded(ratios, 200)

    def play(state, kept, last):
        """Replays the recorded rounds from where the state ends, and fails after `last`."""

        def measure_of(run):
            def measure(names):
                if len(kept) >= last:
                    raise Stop
                pairs = getattr(kept[-1] if kept else state or RuleState(RULE), run)
                at = {name: len(pairs.get(name, [])) for name in names}
                return {name: rounds[run][name][at[name]] for name in names}

            return measure

        def keep(state):
            kept.append(RuleState.from_json(json.loads(json.dumps(state.as_json()))))

        return run_rule(
            specs,
            measure_of("first"),
            RULE,
            confirm=lambda: measure_of("second"),
            state=state,
            on_round=keep,
        )

    whole = play(None, [], 10**6)
    kept = []
    try:
        result = play(None, kept, stop_after)
    except Stop:
        result = play(kept[-1], [], 10**6)
    assert result == whole
    assert play(kept[-1], [], 10**6) == whole


def _recorded(ratios, length):
    machines = {run: Machine(ratios, 0.01, seed) for run, seed in (("first", 1), ("second", 2))}
    return {
        run: {name: [m.pair(name) for _ in range(length)] for name in ratios}
        for run, m in machines.items()
    }


def test_a_state_of_something_else_is_refused():
    state = RuleState(RULE)
    run_rule({"a": SeriesSpec()}, Machine({"a": 1.0}), RULE, state=state)
    with pytest.raises(UsageError, match="others: a, b"):
        run_rule({"b": SeriesSpec()}, Machine({"b": 1.0}), RULE, state=state)
    with pytest.raises(UsageError, match="interrupted run"):
        run_rule({"a": SeriesSpec()}, Machine({"a": 1.0}), Rule(alpha=0.05), state=state)
    for broken in ({}, {**state.as_json(), "phase": "third"}, {**state.as_json(), "first": [1]}):
        with pytest.raises(UsageError, match="state"):
            RuleState.from_json(broken)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_time_that_is_none_names_its_series(bad, side):
    pair = [1.0, 1.0]
    pair[side] = bad
    state = RuleState(RULE)
    good = (1.0, 1.0)
    with pytest.raises(UsageError, match="series rms_norm: expected finite positive"):
        run_rule(
            {"add": SeriesSpec(), "rms_norm": SeriesSpec()},
            lambda names: {"add": good, "rms_norm": tuple(pair)},
            RULE,
            state=state,
        )
    assert state.first == {"add": [], "rms_norm": []}  # the round did not happen


def test_a_measure_that_forgets_a_series_is_refused():
    with pytest.raises(UsageError, match="series a.*none in this round"):
        run_rule({"a": SeriesSpec()}, lambda names: {}, RULE)
    with pytest.raises(UsageError, match="series"):
        run_rule({}, lambda names: {}, RULE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"alpha": 0.0},
        {"alpha": 1.5},
        {"looks": ()},
        {"looks": (20, 12)},
        {"looks": (12, 12)},
        {"looks": (0, 12)},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Rule(**wrong)


@pytest.mark.quick
def test_the_errors_are_shared_out_over_the_looks_that_can_decide():
    assert RULE.plan(1) == (RULE.looks, 0.01 / 5)
    looks, alpha = RULE.plan(30)
    assert looks == (20, 32, 48, 72)  # twelve signs cannot be that sure
    assert alpha == pytest.approx(0.01 / (30 * 4))
    assert critical_index(12, 0.01 / (30 * 5)) is None
    assert critical_index(20, alpha) is not None
    with pytest.raises(UsageError, match="looks.*30 series"):
        Rule(looks=(5,)).plan(30)


def test_the_bounds_are_those_of_the_rule():
    t = 0.02
    ends = [
        (1.0101, 1.5, 0),
        (1.0099, 1.5, None),
        (0.5, 0.99, 1),
        (0.5, 0.9902, None),
        (0.9805, 1.0199, 2),
        (0.9803, 1.0199, None),
        (0.9805, 1.0201, None),
        (1.011, 1.015, 0),  # a small one that is sure is a regression, not "no change"
    ]
    for low, high, which in ends:
        found = [bool(o) for o in outcomes(math.log(low), math.log(high), t)]
        assert found == [i == which for i in range(3)], (low, high)


def test_repeated_looks_miss_no_more_often_than_alpha():
    """All intervals of a run hold together: at every look of every series, seeded simulation."""
    rng = np.random.default_rng(3)
    rule = Rule(alpha=0.2, looks=(12, 20, 32))
    looks, alpha = rule.plan(3)
    runs, missed = 600, 0
    for _ in range(runs):
        noise = rng.standard_t(3, size=(3, looks[-1]))
        intervals = [signed_rank_interval(row[:n], alpha) for row in noise for n in looks]
        missed += any(i.low > 0 or i.high < 0 for i in intervals)
    assert missed / runs <= 0.2
    assert missed / runs > 0.05  # and the shares are not so small that nothing is ever said

"""The decision: speed beyond the band, and within it what does not depend on time."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from fake_kernels import BEST, DEFAULT, FakeTunable, config
from tilewright.autotune.decide import Choice, DecisionRule, choose
from tilewright.autotune.outcome import Outcome

TUNABLE = FakeTunable()
NEAR, FAR = config(64, 64, 2), config(128, 64, 1)  # by the prior: the best, and three steps off
OTHER, THIRD = config(64, 64, 2, 4), config(32, 32, 2, 4)  # of the other class


class Bench:
    """Times by a true ratio to the default, with noise of each round and of each time."""

    def __init__(self, ratios, noise=0.005, seed=0, fails=()):
        self.ratios, self.noise, self.fails = {DEFAULT: 1.0, **ratios}, noise, set(fails)
        self.rng, self.rounds = np.random.default_rng(seed), 0
        self.asked = []

    def __call__(self, configs):
        self.asked.append(tuple(configs))
        clock = self.rng.normal(0, 0.05)  # drifts by round, the same for all
        return {
            c: 1e-5 * self.ratios[c] * math.exp(clock + self.rng.normal(0, self.noise))
            for c in configs
            if c not in self.fails
        }

    def outcomes(self, rounds=12):
        found = []
        for c, ratio in self.ratios.items():
            a, b = np.exp(self.rng.normal(0, self.noise, (2, rounds)))
            reference = () if c == DEFAULT else tuple(1e-5 * b)
            found.append(Outcome(c, "ok", "", tuple(1e-5 * ratio * a), 0.1, reference))
        return found


def decide(ratios, *, seed=0, noise=0.005, rule=None, **options):
    bench = Bench(ratios, noise, seed)
    return choose(TUNABLE, bench, bench.outcomes(), rule, **options)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("ratios", "chosen"),
    [
        ({BEST: 0.8, NEAR: 0.9}, BEST),  # speed
        ({NEAR: 0.997, FAR: 1.0}, DEFAULT),  # tied with the default
        ({BEST: 0.8, NEAR: 0.802}, NEAR),  # tied with one another: the prior
        ({OTHER: 0.98, NEAR: 0.999}, DEFAULT),  # not enough to leave the class
        ({OTHER: 0.95}, OTHER),
        ({OTHER: 0.80, NEAR: 0.81}, NEAR),  # its class has as good a one
        ({OTHER: 0.80, THIRD: 0.801, NEAR: 0.9}, OTHER),  # winners tied: the prior
        ({NEAR: 1.2, OTHER: 1.1}, DEFAULT),
    ],
)
def test_what_is_chosen(ratios, chosen):
    picked = Counter(decide(ratios, seed=seed).config for seed in range(10))
    assert picked == {chosen: 10}


@pytest.mark.quick
def test_the_same_timings_give_the_same_choice():
    assert decide({BEST: 0.9, NEAR: 0.905}, seed=3) == decide({BEST: 0.9, NEAR: 0.905}, seed=3)


def test_the_choice_says_what_it_rests_on():
    choice = decide({BEST: 0.8, NEAR: 0.9, OTHER: 0.95}, rule=DecisionRule(finalist_band=0.5))
    assert choice.seconds == pytest.approx(0.8e-5, rel=0.05)
    assert choice.default_seconds == pytest.approx(1e-5, rel=0.05)
    assert choice.ratio.low < 0.8 < choice.ratio.high < 0.82
    assert [c for c, _ in choice.runners_up] == [NEAR, OTHER, DEFAULT]
    assert choice.numerics == "split_k=1"
    assert choice.tied == (BEST,)
    assert choice.rounds == 12
    assert choice.reason == "faster than the default: which is more than 2.0% behind"


def test_what_is_out_is_timed_no_more():
    rule = DecisionRule(finalist_band=0.5)
    bench = Bench({BEST: 0.8, NEAR: 0.808, FAR: 1.0}, noise=0.02)
    choose(TUNABLE, bench, bench.outcomes(), rule)
    last = bench.asked[-1]
    assert len(bench.asked) == rule.looks[-1]  # capped, hence tied
    assert FAR not in last
    assert {BEST, NEAR, DEFAULT} == set(last)


def test_the_turns_rotate():
    bench = Bench({BEST: 0.8, NEAR: 0.8})
    choose(TUNABLE, bench, bench.outcomes())
    firsts = Counter(turn[0] for turn in bench.asked[:12])
    assert set(firsts.values()) == {4}


def test_a_capped_finalist_is_tied():
    noisy = decide({NEAR: 0.985}, noise=0.05)
    assert noisy.config == DEFAULT
    assert noisy.rounds == DecisionRule().looks[-1]


@pytest.mark.parametrize("ratio", [0.9, 0.97, 0.985, 0.99, 1.0, 1.01])
def test_never_slower_than_the_default(ratio):
    for seed in range(10):
        choice = decide({NEAR: ratio, FAR: ratio * 1.005, OTHER: ratio}, noise=0.02, seed=seed)
        assert choice.config == DEFAULT or choice.ratio.value < 1


@pytest.mark.parametrize("stop_after", [0, 5])
def test_a_decision_that_is_cut_short_rests_on_the_first_measurement(stop_after):
    bench = Bench({BEST: 0.8, NEAR: 0.9})
    stop = lambda: len(bench.asked) >= stop_after  # noqa: E731
    choice = choose(TUNABLE, bench, bench.outcomes(), stop=stop)
    assert (choice.config, choice.rounds) == (BEST, 0)
    assert choice.reason.endswith("by the first measurement alone")
    assert choice.seconds == pytest.approx(0.8e-5, rel=0.05)


def test_a_finalist_that_fails_now_is_dropped():
    bench = Bench({BEST: 0.8, NEAR: 0.82}, fails=[BEST])
    choice = choose(TUNABLE, bench, bench.outcomes())
    assert choice.config == NEAR
    assert choice.dropped == (BEST,)
    assert choice.rounds == 12


def test_where_the_default_fails_now_the_first_measurement_counts():
    bench = Bench({BEST: 0.8}, fails=[DEFAULT])
    choice = choose(TUNABLE, bench, bench.outcomes())
    assert (choice.config, choice.rounds, choice.dropped) == (BEST, 0, ())


@pytest.mark.quick
def test_a_default_that_never_worked_is_not_chosen():
    bench = Bench({})
    bench.ratios = {NEAR: 0.9, BEST: 0.8}
    rows = bench.outcomes()
    alone = Outcome(NEAR, "ok", "", rows[0].seconds)  # raced against nothing: it is the reference
    rows = [Outcome(DEFAULT, "crashed", "SIGSEGV"), alone, rows[1]]
    choice = choose(TUNABLE, bench, rows)
    assert choice.config == BEST
    assert choice.default == DEFAULT
    assert choice.default_seconds is None


@pytest.mark.quick
@pytest.mark.parametrize(
    ("rows", "why"),
    [([], "nothing was measured"), ([Outcome(BEST, "hung", "")], "nothing that was tried works")],
)
def test_nothing_to_choose_from_is_the_default(rows, why):
    choice = choose(TUNABLE, Bench({}), rows)
    assert (choice.config, choice.seconds, choice.reason) == (DEFAULT, None, f"the default: {why}")


def test_the_default_and_the_best_of_its_class_are_always_finalists():
    bench = Bench({OTHER: 0.5, THIRD: 0.51, NEAR: 0.9})
    choice = choose(TUNABLE, bench, bench.outcomes(), DecisionRule(finalists=3))
    assert {c for c, _ in choice.runners_up} | {choice.config} == {OTHER, NEAR, DEFAULT}


@pytest.mark.quick
def test_a_choice_survives_json():
    choice = decide({BEST: 0.8, NEAR: 0.9})
    assert Choice.from_json(choice.to_json()) == choice
    alone = decide({})
    assert Choice.from_json(alone.to_json()) == alone

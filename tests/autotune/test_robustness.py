"""Bad candidates: the run ends with the right winner, and with the reason of each."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from fake_kernels import (
    BEST,
    DEFAULT,
    SPACE,
    FakeTunable,
    InProcess,
    config,
    seconds,
    true_ratio,
)
from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.pool import Bench, Pool
from tilewright.autotune.search import quick_candidates, tune
from tilewright.autotune.worker import Limits, WorkerError

LIMITS = Limits(start=30, load=10, check=0.3, time=10)
QUICK = replace(EFFORTS["quick"], share=0.3)
FAULTS = {
    "hang": ("hung", "no answer within 0.3 s while checking"),
    "segv": ("crashed", "killed by SIGSEGV"),
    "exit": ("crashed", "ended with exit code 3"),
    "garbage": ("wrong", "its error is nan times the tolerance"),
    "wrong": ("wrong", "its error is 50 times the tolerance"),
    "corrupt": ("wrong", "the default came out wrong after it ran"),
    "spill": ("refused", "spills 96 bytes a thread"),
    "oom": ("out_of_memory", "80 GiB wanted"),
    "slow": ("too_slow", "times as slow as the best"),
    "illegal": ("failed", "an illegal memory access"),
}


def candidates(count):
    return quick_candidates(FakeTunable(), limit=count)


def test_every_fault_is_survived_and_reported():
    tried = candidates(24)
    # The faults are those of the fastest candidates, but for the winner.
    winner, *fast = sorted(tried[1:], key=lambda c: (seconds(c), SPACE.index(c)))
    faults = dict(zip(fast, FAULTS, strict=False))
    tunable = FakeTunable(faults, noise=0.005)
    start = time.monotonic()
    with Pool(LIMITS) as pool:
        tuned = tune(tunable, QUICK, pool)
    assert time.monotonic() - start < QUICK.seconds
    outcomes = {o.config: o for o in tuned.outcomes}
    assert set(outcomes) == set(tried)
    for bad, fault in faults.items():
        status, words = FAULTS[fault]
        assert (outcomes[bad].status, fault) == (status, fault)
        assert words in outcomes[bad].reason
    assert all(outcomes[c].ok for c in tried if c not in faults)
    assert tuned.choice.config == winner
    assert not tuned.notes


def test_what_an_earlier_candidate_did_is_not_held_against_a_config():
    first, unlucky = candidates(3)[1:]
    tunable = FakeTunable({unlucky: "unlucky"}, unlucky=True)
    with Pool(LIMITS) as pool:
        bench = Bench(pool, tunable)
        assert bench.screen(DEFAULT).ok
        assert bench.screen(first).ok
        assert bench.screen(unlucky).ok  # after a crash, alone in a second worker
        assert pool.starts == 2
        assert bench.trouble


def test_a_config_that_crashes_alone_is_final_at_once():
    bad = candidates(2)[1]
    with Pool(LIMITS) as pool:
        bench = Bench(pool, FakeTunable({bad: "segv"}))
        assert bench.screen(DEFAULT).ok
        assert bench.screen(bad).status == "crashed"
        assert pool.starts == 1
        other = candidates(3)[2]
        assert bench.screen(other).ok
        assert bench.screen(bad).status == "crashed"
        assert pool.starts == 3  # one that others had run in, then one of its own


def test_a_default_that_fails_is_reported_and_another_is_the_reference():
    tunable = FakeTunable({DEFAULT: "segv"}, noise=0.002)
    with Pool(LIMITS) as pool:
        tuned = tune(tunable, QUICK, pool)
    outcomes = {o.config: o for o in tuned.outcomes}
    assert outcomes[DEFAULT].status == "crashed"
    assert all(o.ok for c, o in outcomes.items() if c != DEFAULT)
    assert tuned.choice.config != DEFAULT
    assert tuned.choice.default_seconds is None


def test_ctrl_c_in_the_middle_of_a_candidate_leaves_no_worker_and_keeps_what_is_known():
    tried = candidates(24)
    limits = replace(LIMITS, check=60.0)
    with Pool(limits) as pool:
        tuned = tune(FakeTunable({tried[6]: "ctrl_c"}, noise=0.002), QUICK, pool)
        assert tuned.interrupted
        assert len(tuned.outcomes) == 6
        assert tuned.choice.rounds == 0
        assert pool.starts == 1
        assert pool._worker is None


def test_one_worker_serves_one_tunable_after_the_other():
    with Pool(LIMITS) as pool:
        chosen = [
            tune(FakeTunable(name=name, noise=0.002), EFFORTS["quick"], pool).choice.config
            for name in ("decode", "prefill")
        ]
    assert chosen[0] == chosen[1] != DEFAULT
    assert pool.starts == 1


def test_where_everything_fails_the_default_is_chosen():
    tunable = FakeTunable(dict.fromkeys(candidates(24), "wrong"))
    with Pool(start=InProcess) as pool:
        tuned = tune(tunable, QUICK, pool)
    assert tuned.choice.config == DEFAULT
    assert tuned.choice.reason == "the default: nothing that was tried works"


def test_a_runner_that_cannot_be_built_is_an_error():
    with Pool(LIMITS) as pool, pytest.raises(WorkerError, match="no such device"):
        tune(FakeTunable(broken=True), QUICK, pool)


class Dying(InProcess):
    """A device that falls off the bus after so many checks, for good."""

    left = 0

    def check(self, c):
        Dying.left -= 1
        if Dying.left < 0:
            return 1e9
        return super().check(c)


@pytest.mark.parametrize("checks", [7, 20, 60])
def test_a_device_that_dies_on_the_way_ends_the_search_not_the_run(checks):
    Dying.left = checks
    tunable = FakeTunable(noise=0.002)
    with Pool(start=Dying) as pool:
        tuned = tune(tunable, QUICK, pool)
    good = [o for o in tuned.outcomes if o.ok]
    assert good
    assert true_ratio(tuned.choice.config, tunable) <= 1.01
    assert tuned.choice.config in {o.config for o in good}
    if checks < 60:
        assert "the search ended early" in tuned.notes[0]
        assert "in a fresh process" in tuned.notes[0]


def test_finalists_are_checked_again_after_a_crash():
    bad = candidates(24)[-1]
    checked = []

    class Counting(InProcess):
        def check(self, c):
            checked.append(c)
            return super().check(c)

    with Pool(start=Counting) as pool:
        tuned = tune(FakeTunable({bad: "illegal"}, noise=0.002), QUICK, pool)
    after_the_last_candidate = checked[len(checked) - checked[::-1].index(bad) :]
    finalists = {tuned.choice.config, *(c for c, _ in tuned.choice.runners_up)}
    assert set(after_the_last_candidate) == finalists


@pytest.mark.quick
def test_a_hiccup_of_the_reference_does_not_matter_much():
    with Pool(start=InProcess) as pool:
        bench = Bench(pool, FakeTunable(noise=0.05))
        assert bench.screen(DEFAULT).ok
        outcome = bench.screen(BEST, best=0.7)
    assert outcome.ok
    assert outcome.ratio == pytest.approx(true_ratio(BEST, FakeTunable()), rel=0.1)
    assert config(64, 128, 3) == BEST

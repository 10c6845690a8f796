"""The search: what is tried, that noise does not change it, and what is never done twice."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest

from fake_kernels import (
    BEST,
    DEFAULT,
    NAMES,
    SPACE,
    FakeTunable,
    InProcess,
    config,
    seconds,
    timed,
    true_ratio,
)
from tilewright.autotune.effort import EFFORTS, TuneConfig, effort_of
from tilewright.autotune.pool import Pool
from tilewright.autotune.search import quick_candidates, study_name, tune
from tilewright.autotune.space import Config
from tilewright.errors import UsageError

QUICK = replace(EFFORTS["quick"], share=0.3)  # of a space of 90
FULL = replace(EFFORTS["full"], candidates=12, trials=30, rounds=9)


def run(tunable, effort=QUICK, **options):
    with Pool(start=InProcess) as pool:
        tuned = tune(tunable, effort, pool, **options)
    return tuned, pool


@pytest.mark.quick
def test_quick_candidates_are_a_function_of_the_key():
    found = quick_candidates(FakeTunable(), limit=12)
    assert found == quick_candidates(FakeTunable(noise=0.5, seed=7), limit=12)
    assert found[0] == DEFAULT
    assert found[1] == config(64, 64, 2)  # the prior's best
    assert len(set(found)) == 12


@pytest.mark.quick
def test_neighbours_come_after_the_default_and_invalid_ones_not_at_all():
    winner, foreign = config(16, 16, 1), Config((("other", 1),))
    too_large = config(128, 128, 1)
    found = quick_candidates(FakeTunable(), [foreign, winner, too_large, DEFAULT], limit=5)
    assert found[:3] == (DEFAULT, winner, config(64, 64, 2))
    assert not {foreign, too_large} & set(found)


@pytest.mark.quick
def test_the_priors_best_do_not_crowd_one_tile():
    found = quick_candidates(FakeTunable(), limit=20)
    tiles = Counter((c["block_m"], c["block_n"]) for c in found)
    assert max(tiles.values()) <= 3
    every = quick_candidates(FakeTunable())
    assert sorted(map(SPACE.index, every)) == sorted(map(SPACE.index, SPACE.configs()))


@pytest.mark.parametrize(
    ("formula", "noise", "same_config"),
    [({}, 0.01, True), ({"gap": 0.002}, 0.01, False), ({"split_k": 0.975}, 0.01, False)],
)
def test_twenty_runs_with_other_noise_choose_the_same(formula, noise, same_config):
    chosen = Counter()
    for seed in range(20):
        tunable = FakeTunable(seed=seed, noise=noise, formula=formula)
        tuned, _ = run(tunable)
        chosen[tuned.choice.config] += 1
        assert true_ratio(tuned.choice.config, tunable) <= 1.01
        tried = {o.config for o in tuned.outcomes}
        assert tried == set(quick_candidates(tunable, limit=QUICK.allowed(SPACE)))
    assert {c["split_k"] for c in chosen} == {1}
    assert not same_config or len(chosen) == 1


def test_quick_is_near_the_best_with_few_rounds_for_the_bad():
    tunable = FakeTunable(noise=0.005)
    tuned, pool = run(tunable)
    tried = [seconds(o.config) for o in tuned.outcomes]
    assert seconds(tuned.choice.config) <= min(tried) * 1.03
    stopped = [o for o in tuned.outcomes if o.stopped]
    assert stopped
    assert all("times" in o.reason and len(o.seconds) < 12 for o in stopped)
    everything = len(tried) * 2 * 12
    assert pool.rounds < everything
    assert tuned.coverage.tried == len(tried)
    assert all(o.facts["sm_mhz"] == 1980 for o in tuned.outcomes)


def test_quick_takes_a_share_of_the_space():
    tuned, _ = run(FakeTunable(), EFFORTS["quick"])
    assert len(tuned.outcomes) == SPACE.count() // 10


def test_full_goes_on_with_the_sampler_and_finds_the_best(monkeypatch):
    monkeypatch.setattr("tilewright.autotune.search.EXHAUSTIVE_BELOW", 10)
    tuned, _ = run(FakeTunable(noise=0.002), FULL, seed=3)
    again, _ = run(FakeTunable(noise=0.002), FULL, seed=3)
    assert len(tuned.outcomes) == 30
    assert true_ratio(tuned.choice.config, FakeTunable(), BEST) <= 1.01
    assert [o.config for o in tuned.outcomes] == [o.config for o in again.outcomes]


def test_a_small_space_is_tried_whole(tmp_path):
    log = tmp_path / "log"
    tuned, _ = run(FakeTunable(noise=0.002, log=str(log)), EFFORTS["full"])
    assert tuned.coverage.tried == tuned.coverage.valid == SPACE.count()
    assert tuned.choice.config == BEST
    assert len(timed(log)) == SPACE.count()


def test_identical_binaries_are_measured_once(tmp_path):
    log = tmp_path / "log"
    _, same, *others = quick_candidates(FakeTunable(), limit=8)
    twins = dict.fromkeys(others[1:4], str(same))
    tuned, _ = run(FakeTunable(twins=twins, log=str(log)))
    outcomes = {o.config: o for o in tuned.outcomes}
    assert not {str(c) for c in twins} & set(timed(log))
    for twin in twins:
        assert outcomes[twin].reason.startswith(f"the same binary as {same}")
        assert outcomes[twin].seconds == outcomes[same].seconds


@pytest.mark.quick
@pytest.mark.parametrize(
    "effort",
    [EFFORTS["none"], EFFORTS["cached"], effort_of(TuneConfig(trials=0)),
     effort_of(TuneConfig(seconds=0))],
)  # fmt: skip
def test_a_budget_of_zero_is_the_default_and_a_note(effort):
    tunable = FakeTunable()
    tuned, pool = run(tunable, effort)
    assert tuned.choice.config == DEFAULT
    assert (pool.starts, pool.rounds, tunable.prepared, tuned.outcomes) == (0, 0, [], ())
    assert "nothing" in tuned.notes[0]


@pytest.mark.quick
def test_efforts_are_a_table_and_misuse_is_named():
    assert effort_of("quick") is EFFORTS["quick"]
    custom = effort_of(TuneConfig(trials=7, seconds=3.0))
    assert (custom.trials, custom.seconds, custom.name) == (7, 3.0, "full, 7 trials, 3 s")
    with pytest.raises(UsageError, match="none, cached, quick, full"):
        effort_of("fast")
    with pytest.raises(UsageError, match="seconds"):
        TuneConfig(seconds=-1)


def test_a_budget_of_trials_keeps_the_default_first():
    tuned, _ = run(FakeTunable(), effort_of(TuneConfig(trials=3)))
    assert {o.config for o in tuned.outcomes} == set(quick_candidates(FakeTunable(), limit=3))
    assert DEFAULT in {o.config for o in tuned.outcomes}


def test_the_deadline_ends_the_search_and_what_is_known_is_decided_on():
    tunable = FakeTunable()
    tuned, pool = run(tunable, deadline=time.monotonic() - 1)
    assert tuned.choice.config == DEFAULT
    assert "out of time" in tuned.notes[0]
    assert pool.rounds == 0


def test_stop_is_asked_between_candidates():
    seen = []
    stop = lambda: bool(seen) and seen[-1].done >= 5  # noqa: E731
    tuned, _ = run(FakeTunable(), progress=seen.append, stop=stop)
    assert len(tuned.outcomes) == 5
    assert tuned.choice.rounds == 0
    assert true_ratio(tuned.choice.config, FakeTunable()) <= 1


def test_ctrl_c_keeps_what_is_known():
    tunable = FakeTunable({quick_candidates(FakeTunable())[8]: "interrupt"})
    tuned, _ = run(tunable)
    assert tuned.interrupted
    assert len(tuned.outcomes) == 8
    assert tuned.choice.config != DEFAULT
    assert "interrupted" in tuned.notes[0]


def test_progress_tells_the_best_and_the_time_left():
    seen = []
    run(FakeTunable(noise=0.001), progress=seen.append)
    search = [p for p in seen if p.phase == "search"]
    assert [p.done for p in search] == list(range(1, 25))
    assert search[-1].total == 24
    assert search[-1].best == min(p.best for p in search) < 1
    assert 0 < search[-1].seconds_left < QUICK.seconds
    assert any(p.phase == "decision" for p in seen)


def test_a_compilation_that_raises_refuses_only_its_own():
    class Raising(FakeTunable):
        def prepare(self, configs):
            if config(64, 64, 2) in configs:
                raise RuntimeError("ptxas died")
            return super().prepare(configs)

    tuned, _ = run(Raising())
    refused = [o for o in tuned.outcomes if o.status == "refused"]
    assert [(o.config, o.reason) for o in refused] == [
        (config(64, 64, 2), "RuntimeError: ptxas died")
    ]
    assert len(tuned.outcomes) == 24


@pytest.mark.quick
def test_the_name_of_a_study_is_of_the_key_and_the_conditions():
    assert study_name(FakeTunable()) == study_name(FakeTunable(seed=1))
    assert study_name(FakeTunable(), "triton-3.7") != study_name(FakeTunable())
    assert SPACE.names == NAMES


def test_what_is_pinned_is_tried_right_behind_the_default():
    worst = max(SPACE.configs(), key=FakeTunable().prior)
    foreign = Config((("block", 7),))
    found = quick_candidates(FakeTunable(pinned=[worst, foreign]), limit=12)
    default, second, *others = found
    assert default == DEFAULT and second == worst and foreign not in others
    assert set(others) < set(quick_candidates(FakeTunable(), limit=12))
    pinned = quick_candidates(FakeTunable(pinned=[DEFAULT]), limit=12)
    assert pinned == quick_candidates(FakeTunable(), limit=12)

"""Budgets and interrupts over several problems: what is measured, kept, given up and taken up.

The players time configs by the prior; the clock is one that they turn.
"""

from __future__ import annotations

import pytest

from tilewright.autotune import search
from tilewright.autotune.effort import EFFORTS, TuneConfig, effort_of
from tilewright.autotune.search import quick_candidates
from tilewright.autotune.store import Store
from tilewright.autotune.tunable import Ready
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.compiler import tuning
from tilewright.compiler.tuning import CUT_SHORT, tune_all, tune_decode
from tilewright.errors import UsageError
from tilewright.targets import TARGETS
from tuning_players import Clock, Steady, gemm_problems

QUICK = EFFORTS["quick"]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each config is a binary of its own, without a compiler."""
    monkeypatch.setattr(
        KernelTunable, "prepare", lambda self, configs: {c: Ready(str(c)) for c in configs}
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (tuning, search):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "tuning.jsonl")


def tuned(wanted, effort, store, **options):
    with Steady.pool(wanted, **options.pop("player", {})) as pool:
        found = list(tune_all(wanted, effort, store, pool=pool, **options))
    return found, pool


@pytest.mark.parametrize("name", ["quick", "full"])
def test_trials_cap_each_problem_and_leave_the_rest_of_the_effort(store, name) -> None:
    effort = effort_of(name).limited(trials=5)
    of_name = EFFORTS[name]
    assert (effort.candidates, effort.share, effort.seconds, effort.finalists) == (
        of_name.candidates,
        of_name.share,
        of_name.seconds,
        of_name.finalists,
    )
    wanted = gemm_problems(2)
    found, _ = tuned(wanted, effort, store)
    for one, tunable in zip(found, wanted, strict=True):
        tried = {outcome.config for outcome in one.tuned.outcomes}
        assert tried == set(quick_candidates(tunable, limit=5))
        assert one.record.budget == f"{name}, 5 trials"


def test_more_trials_than_quick_has_are_drawn(store) -> None:
    (one,), _ = tuned(gemm_problems(1), QUICK.limited(trials=30), store)
    assert len(one.tuned.outcomes) == 30


@pytest.mark.parametrize("budget", [{"trials": 0}, {"seconds": 0}, {"trials": 0, "seconds": 9}])
def test_zero_measures_nothing_and_says_so(store, budget) -> None:
    effort = QUICK.limited(**budget)
    assert not effort.measures and not effort_of(TuneConfig(**budget)).measures
    found, pool = tuned(gemm_problems(2), effort, store, seconds=budget.get("seconds"))
    assert (pool.rounds, pool.starts, store.path.exists()) == (0, 0, False)
    assert all(one.record is None for one in found)
    assert {n for one in found for n in one.tuned.notes} == {
        "the budget is zero, so nothing was measured"
    }


def test_seconds_are_for_everything_and_what_is_not_reached_is_known(store, clock) -> None:
    wanted = gemm_problems(4)
    tuned(wanted[3:], QUICK, store, player={"clock": clock})
    # A round takes a second: the first problem takes all that there is.
    found, _ = tuned(wanted, QUICK, store, seconds=30, player={"clock": clock})
    assert [one.reached for one in found] == [True, False, False, True]
    first, *_, known = found
    assert first.record.budget == f"quick{CUT_SHORT}" and known.tuned is None
    assert "out of time" in first.tuned.notes[0]


def test_what_was_cut_short_is_taken_up_and_what_ended_is_not(store, clock) -> None:
    wanted = gemm_problems(2)
    tuned(wanted, QUICK, store, seconds=30, player={"clock": clock})
    found, _ = tuned(wanted, QUICK, store, player={"clock": clock})
    assert all(one.tuned is not None and one.record.budget == "quick" for one in found)
    again, pool = tuned(wanted, QUICK, store, player={"clock": clock})
    assert pool.rounds == 0 and [one.record for one in again] == [one.record for one in found]


def test_ctrl_c_keeps_what_ended_and_what_was_known_of_the_one_at_hand(store) -> None:
    wanted = gemm_problems(3)
    victim = quick_candidates(wanted[1])[3]
    interrupt = {"interrupt": (wanted[1].name, victim)}
    found, _ = tuned(wanted, QUICK, store, player=interrupt)
    assert [one.reached for one in found] == [True, True, False]
    assert found[1].tuned.interrupted and len(found[1].tuned.outcomes) == 3
    assert [r.budget for r in store.records()] == ["quick", f"quick{CUT_SHORT}"]
    on, _ = tuned(wanted, QUICK, store)
    assert [one.tuned is None for one in on] == [True, False, False]
    assert [r.budget for r in Store(store.path).records()] == ["quick"] * 3


def test_ctrl_c_and_resume_with_a_storage_measure_nothing_twice(store, tmp_path) -> None:
    wanted, storage = gemm_problems(2), tmp_path / "journal"
    victim = quick_candidates(wanted[1])[3]
    interrupt = {"interrupt": (wanted[1].name, victim)}
    first, _ = tuned(wanted, QUICK, store, storage=storage, player=interrupt)
    kept = {o.config: o for o in first[1].tuned.outcomes}
    assert kept
    on, _ = tuned(wanted, QUICK, store, storage=storage, resume=True)
    assert on[0].tuned is None and not on[1].tuned.interrupted
    assert {o.config: o for o in on[1].tuned.outcomes if o.config in kept} == kept


def test_a_compile_that_is_interrupted_ends_and_the_store_has_what_was_found(
    store, monkeypatch
) -> None:
    wanted = gemm_problems(1)
    player = Steady.pool(wanted, interrupt=(wanted[0].name, quick_candidates(wanted[0])[2]))
    monkeypatch.setattr(tuning, "problems_of", lambda *given: wanted)
    monkeypatch.setattr(tuning, "tuning_store", lambda: store)
    monkeypatch.setattr(tuning, "Pool", lambda: player)

    class Options:
        tune, target, max_batch_size = TuneConfig(trials=6), TARGETS["h100"], 16

    with pytest.raises(KeyboardInterrupt):
        tune_decode(None, Options())
    assert [r.budget for r in store.records()] == [f"full, 6 trials{CUT_SHORT}"]


def test_a_store_that_cannot_be_written_costs_no_measurement(tmp_path) -> None:
    file = tmp_path / "file"
    file.touch()
    wanted = gemm_problems(1)
    with Steady.pool(wanted) as pool, pytest.warns(UserWarning, match="cannot be read"):
        with pytest.raises(UsageError, match="TILEWRIGHT_CACHE"):
            list(tune_all(wanted, QUICK, Store(file / "s.jsonl"), pool=pool))
        assert (pool.rounds, pool.starts) == (0, 0)


@pytest.mark.quick
def test_a_compiles_budget_means_the_same() -> None:
    effort = effort_of(TuneConfig(trials=7, seconds=3.0))
    assert effort == EFFORTS["full"].limited(7, 3.0)
    assert effort_of(TuneConfig()) is EFFORTS["full"]
    for wrong in ({"trials": -1}, {"seconds": -0.5}):
        with pytest.raises(UsageError, match="from 0"):
            TuneConfig(**wrong)

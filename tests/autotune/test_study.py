"""The study: storages, processes that share one, and those that leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from fake_kernels import DEFAULT, SPACE, FakeTunable, InProcess, config, timed
from tilewright.autotune.effort import EFFORTS
from tilewright.autotune.outcome import Outcome
from tilewright.autotune.pool import Pool
from tilewright.autotune.search import quick_candidates, study_name, tune
from tilewright.autotune.study import Board, StorageError, open_storage

QUICK = replace(EFFORTS["quick"], share=0.3)


def run(storage, tunable=None, effort=QUICK, **options):
    tunable = tunable or FakeTunable(noise=0.002)
    with Pool(start=InProcess) as pool:
        tuned = tune(tunable, effort, pool, storage=storage, **options)
    return tuned, pool


@pytest.fixture
def proxy():
    """Optuna's gRPC proxy on the loopback, in front of a database in memory."""
    import grpc
    from optuna.storages import InMemoryStorage
    from optuna.storages._grpc.server import api_pb2_grpc, grpc_servicer

    server = grpc.server(ThreadPoolExecutor(4))
    service = grpc_servicer.OptunaStorageProxyService(InMemoryStorage())
    api_pb2_grpc.add_StorageServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"grpc://127.0.0.1:{port}"
    server.stop(None)


def two_processes(storage, log):
    """What each of two tuning processes on one study has chosen."""
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "fake_kernels", str(storage), str(log), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        for seed in (1, 2)
    ]
    for process in started:  # together, or the first may leave the other nothing
        process.stdout.readline()
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def screened(storage):
    """How often each config has an outcome of its own in the study."""
    import optuna

    study = optuna.load_study(study_name=study_name(FakeTunable()), storage=open_storage(storage))
    texts = [json.dumps(t.user_attrs["config"]) for t in study.trials if "outcome" in t.user_attrs]
    return {text: texts.count(text) for text in texts}, study


def assert_shared(found, storage, log):
    assert found[0] == found[1]
    assert found[0]["tried"] == 24
    counts, study = screened(storage)
    assert len(counts) == 24
    assert set(counts.values()) == {1}
    by = {t.user_attrs["by"]["pid"] for t in study.trials if "outcome" in t.user_attrs}
    assert len(by) == 2  # both took part
    # The default is everyone's reference; the finalists are timed by the one that decides.
    finalists = {text for text, who in timed(log).items() if len(set(who)) > 1}
    assert len(finalists) <= 1 + EFFORTS["full"].finalists


def test_two_processes_share_a_journal_file_and_measure_nothing_twice(tmp_path):
    storage, log = tmp_path / "journal", tmp_path / "log"
    assert_shared(two_processes(storage, log), storage, log)


def test_two_processes_share_a_study_through_the_grpc_proxy(tmp_path, proxy):
    log = tmp_path / "log"
    assert_shared(two_processes(proxy, log), proxy, log)


def test_a_database_serves_too(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    effort = replace(QUICK, trials=4)
    tuned, _ = run(url, effort=effort)
    again, pool = run(url, effort=effort)
    assert again.choice == tuned.choice
    assert pool.rounds == 0


def test_a_second_run_measures_nothing(tmp_path):
    tuned, first = run(tmp_path / "journal")
    again, second = run(tmp_path / "journal")
    assert first.rounds > 0
    assert (second.rounds, second.starts) == (0, 0)
    assert again.choice == tuned.choice
    assert again.outcomes == tuned.outcomes


def test_full_goes_on_from_what_quick_knows(tmp_path):
    quick, _ = run(tmp_path / "journal", effort=replace(QUICK, trials=12))
    log, effort = tmp_path / "log", replace(EFFORTS["full"], candidates=8, trials=20)
    full, _ = run(tmp_path / "journal", FakeTunable(noise=0.002, log=str(log)), effort)
    assert full.coverage.tried == 20
    again = {str(o.config) for o in quick.outcomes if o.stopped} & set(timed(log))
    assert not again  # only the default and finalists are timed anew


def test_an_interrupted_run_is_resumed(tmp_path):
    victim = quick_candidates(FakeTunable())[8]
    first, _ = run(tmp_path / "journal", FakeTunable({victim: "interrupt"}))
    assert first.interrupted
    log = tmp_path / "log"
    tuned, _ = run(tmp_path / "journal", FakeTunable(noise=0.002, log=str(log)), resume=True)
    assert not tuned.interrupted
    assert {o.config for o in tuned.outcomes} == set(quick_candidates(FakeTunable(), limit=24))
    kept = {o.config: o for o in first.outcomes}
    assert {o.config: o for o in tuned.outcomes if o.config in kept} == kept
    assert str(victim) in timed(log)


def board(storage, **options):
    return Board(storage, "study", SPACE, **options)


@pytest.mark.quick
def test_enqueued_configs_come_in_order_and_once(tmp_path):
    a, b = board(tmp_path / "j"), board(tmp_path / "j")
    wanted = [DEFAULT, config(64, 64, 2), config(16, 16, 1)]
    a.enqueue(wanted)
    b.enqueue(wanted)
    claims = [a.claim(), b.claim(), a.claim()]
    assert [claim.config for claim in claims] == wanted
    assert a.claim() is None
    assert b.claim() is None


@pytest.mark.quick
def test_the_same_config_enqueued_twice_is_tried_once(tmp_path):
    a = board(tmp_path / "j")
    a.enqueue([DEFAULT])
    a._enqueue(DEFAULT)  # as two processes do that look at the same time
    assert a.claim().config == DEFAULT
    assert a.claim() is None


def test_threads_that_sample_get_configs_of_their_own(tmp_path):
    boards = [board(tmp_path / "j", seed=1) for _ in range(3)]
    got, lock = [], threading.Lock()

    def sample(mine):
        while (claim := mine.claim(sample_up_to=24)) is not None:
            with lock:
                got.append(claim.config)
            mine.tell(claim, Outcome(claim.config, "ok", "", (1.0, 1.0)))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(sample, boards))
    assert len(got) == len(set(got)) == 24
    assert all(SPACE.contains(c) for c in got)


def test_the_claim_of_a_process_that_is_gone_is_given_to_another(tmp_path):
    script = (
        "import os, sys; from fake_kernels import *; from tilewright.autotune.study import Board\n"
        "b = Board(sys.argv[1], 'study', SPACE); b.enqueue([DEFAULT])\n"
        "assert b.claim(); os._exit(0)"
    )
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "j")],
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    mine = board(tmp_path / "j")
    assert mine.claim() is None
    assert not mine.others()
    assert mine.waiting()
    assert mine.claim().config == DEFAULT


@pytest.mark.quick
def test_a_live_claim_is_left_alone_unless_the_run_is_resumed(tmp_path):
    other = board(tmp_path / "j")
    other.enqueue([DEFAULT])
    claim = other.claim()
    assert board(tmp_path / "j").others()
    resumed = board(tmp_path / "j", resume=True)
    assert not resumed.others()
    assert resumed.claim().config == DEFAULT
    other.tell(claim, Outcome(DEFAULT, "ok", "", (1.0,)))  # too late, and no error


@pytest.mark.quick
def test_a_claim_that_is_too_old_is_given_to_another(tmp_path, monkeypatch):
    other = board(tmp_path / "j")
    other.enqueue([DEFAULT])
    assert other.claim()
    monkeypatch.setattr("tilewright.autotune.study._CLAIM_SECONDS", -1.0)
    mine = board(tmp_path / "j")
    assert not mine.others()
    assert mine.claim().config == DEFAULT


@pytest.mark.quick
def test_a_task_is_done_by_one_and_the_others_take_its_result(tmp_path):
    a, b = board(tmp_path / "j"), board(tmp_path / "j")
    assert a.once("decide", lambda: {"x": 1}, lambda: False) == {"x": 1}
    assert b.once("decide", lambda: pytest.fail("twice"), lambda: False) == {"x": 1}
    assert b.once("another", lambda: {"x": 2}, lambda: False) == {"x": 2}


@pytest.mark.quick
def test_a_task_whose_doer_failed_is_done_by_another(tmp_path):
    a, b = board(tmp_path / "j"), board(tmp_path / "j")
    with pytest.raises(ZeroDivisionError):
        a.once("decide", lambda: {"x": 1 // 0}, lambda: False)
    assert b.once("decide", lambda: {"x": 2}, lambda: False) == {"x": 2}


@pytest.mark.filterwarnings("ignore:Fixed parameter")
@pytest.mark.quick
def test_nonsense_that_someone_enqueued_is_passed_over(tmp_path):
    mine = board(tmp_path / "j")
    mine.study.enqueue_trial({"block_m": 1, "block_n": 5, "stages": 1, "split_k": 1})
    mine.enqueue([DEFAULT])
    assert mine.claim(sample_up_to=24).config in SPACE.configs()


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("grpc://127.0.0.1:1", "gRPC"),
        ("grpc://nowhere", "storage grpc://nowhere"),
        ("no/such/folder/journal", "No such file"),
        ("nodialect://host/db", "nodialect"),
        ("sqlite:////no/such/folder/study.db", "unable to open"),
    ],
)
def test_a_storage_that_does_not_answer_is_a_clear_error(storage, words, monkeypatch):
    monkeypatch.setattr("tilewright.autotune.study.ANSWER_SECONDS", 0.2)
    with pytest.raises(StorageError, match=words) as caught:
        run(storage)
    assert storage in str(caught.value)
    tuned, pool = run(storage, storage_fallback=True)
    assert tuned.notes[0].startswith("tuned in memory: storage")
    assert pool.rounds > 0


def test_a_damaged_journal_is_a_clear_error(tmp_path):
    (tmp_path / "j").write_text("not json\n" * 3)
    with pytest.raises(StorageError, match="storage .*/j"):
        run(tmp_path / "j")


def test_a_storage_that_is_lost_on_the_way_costs_nothing_that_is_known(proxy, monkeypatch):
    tell, told = Board.tell, []

    def losing(self, claim, outcome):
        told.append(outcome)
        if len(told) > 6:
            raise StorageError("storage x", expected="it", found="nothing", remedy="Start it.")
        tell(self, claim, outcome)

    monkeypatch.setattr(Board, "tell", losing)
    tuned, _ = run(proxy)
    assert len(tuned.outcomes) == 7
    assert "the search ended early: storage x" in tuned.notes[0]
    assert tuned.choice.rounds > 0

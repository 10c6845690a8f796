"""Processes that compile: kept while someone wants them, replaced when they end, none left over."""

from __future__ import annotations

import os
import signal

import pytest

from tilewright.codegen.triton import workers
from tilewright.codegen.triton.aot import worker_environment
from tilewright.codegen.triton.workers import Worker, in_workers, kept_workers

BAD = {"text": "def f(:\n", "function": "f"}  # an error is an answer too, and takes no compiler


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    found: list[Worker] = []

    class Seen(Worker):
        def __init__(self, environment) -> None:
            super().__init__(environment)
            found.append(self)

    monkeypatch.setattr(workers, "Worker", Seen)
    monkeypatch.setattr(workers, "_KEPT", workers._Kept())  # not those of the session
    return found


def ended(worker: Worker) -> bool:
    return worker.process.poll() is not None and not os.path.exists(worker._folder.name)


@pytest.mark.quick
def test_workers_are_kept_inside_and_end_with_it(started: list[Worker]) -> None:
    environment = worker_environment()
    with kept_workers():
        for _ in range(3):
            ((answer,),) = in_workers([[BAD]], environment)
            assert "SyntaxError" in answer["error"]
        assert len(started) == 1 and started[0].lives
        with kept_workers():
            in_workers([[BAD]], environment)
        assert len(started) == 1 and started[0].lives
    assert ended(started[0])


def test_outside_each_call_has_its_own(started: list[Worker]) -> None:
    in_workers([[BAD], [BAD]], worker_environment())
    assert len(started) == 2 and all(map(ended, started))


def test_another_environment_gets_another_worker(started: list[Worker]) -> None:
    with kept_workers():
        in_workers([[BAD]], worker_environment())
        in_workers([[BAD]], {**worker_environment(), "SOMETHING": "else"})
        assert len(started) == 2 and ended(started[0])


def test_one_that_was_killed_answers_with_an_error_and_is_replaced(started: list[Worker]) -> None:
    environment = worker_environment()
    with kept_workers():
        in_workers([[BAD]], environment)
        os.kill(started[0].process.pid, signal.SIGKILL)
        started[0].process.wait()
        ((answer,),) = in_workers([[BAD]], environment)
        assert "SyntaxError" in answer["error"] and len(started) == 2
        worker = Worker(environment)
        worker.process.kill()
        answers = worker.answers([BAD, BAD])
        assert [answer["error"] for answer in answers] == ["exit code -9"] * 2
        worker.close()


def test_an_error_on_the_way_leaves_none(started: list[Worker], monkeypatch) -> None:
    def interrupted(self, jobs):
        raise KeyboardInterrupt

    with kept_workers():
        in_workers([[BAD]], worker_environment())
        monkeypatch.setattr(Worker, "answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            in_workers([[BAD], [BAD]], worker_environment())
        assert all(map(ended, started))

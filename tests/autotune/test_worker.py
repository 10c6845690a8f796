"""A worker process: what its candidates do to it, and what is said of them."""

from __future__ import annotations

import math
import os
import time

import pytest

from fake_kernels import BEST, DEFAULT, FakeTunable, config
from tilewright.autotune.outcome import CandidateError, Outcome
from tilewright.autotune.tunable import RunnerSpec
from tilewright.autotune.worker import Limits, Worker, WorkerError
from tilewright.errors import UsageError

LIMITS = Limits(start=30, load=10, check=0.4, time=10)
BAD = config(16, 16, 1)


@pytest.fixture
def worker():
    started = Worker(LIMITS)
    yield started
    started.close()


def opened(worker, fault=None, **spec):
    worker.open(FakeTunable({BAD: fault} if fault else {}, **spec).runner)
    return worker


def test_it_loads_checks_and_times_whatever_is_printed(worker):
    opened(worker, noise=0.0, prints=True)
    worker.load(BEST)
    assert worker.check(BEST) == pytest.approx(0.1)
    assert worker.time(BEST, 3) == pytest.approx((20e-6,) * 3)
    assert worker.facts() == {"device": "fake", "sm_mhz": 1980}


@pytest.mark.parametrize(
    ("fault", "status", "words", "breaks"),
    [
        ("hang", "hung", "no answer within 0.4 s while checking", True),
        ("segv", "crashed", "killed by SIGSEGV while checking; its last words: last words", True),
        ("exit", "crashed", "ended with exit code 3 while checking", True),
        ("oom", "out_of_memory", "MemoryError: out of memory: 80 GiB wanted", False),
        ("illegal", "failed", "illegal memory access was encountered (while timing)", True),
    ],
)
def test_each_fault_has_its_name_and_its_words(worker, fault, status, words, breaks):
    opened(worker, fault)
    with pytest.raises(CandidateError) as caught:
        worker.load(BAD)
        worker.check(BAD)
        worker.time(BAD, 1)
    error = caught.value
    assert (error.status, error.breaks) == (status, breaks)
    assert words in error.reason


def test_a_worker_takes_one_runner_after_the_other(worker):
    opened(worker, noise=0.0)
    slow = worker.time(BEST, 1)[0]
    opened(worker, noise=0.0, formula={"gap": 0.5})
    assert worker.time(DEFAULT, 1)[0] > slow * 2


def test_times_that_are_none_are_refused(worker):
    opened(worker, factors={str(BAD): -1.0})
    with pytest.raises(CandidateError, match="its runner gave"):
        worker.time(BAD, 1)


def test_a_hung_worker_dies_when_it_is_closed(worker):
    opened(worker, "hang")
    with pytest.raises(CandidateError):
        worker.check(BAD)
    worker.close()
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.process.pid, 0)


def test_a_worker_ends_with_its_parent_even_as_it_hangs(worker):
    opened(worker, "hang")
    with pytest.raises(CandidateError):
        worker.check(BAD)
    os.close(worker._requests)
    assert worker.process.wait(10) == 0
    worker._requests = os.open(os.devnull, os.O_WRONLY)  # for close()


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (RunnerSpec("fake_kernels:runner", {"faults": {}, "broken": 1}), "no such device"),
        (RunnerSpec("fake_kernels:none"), "AttributeError"),
        (RunnerSpec("no_such_module:runner"), "No module named"),
    ],
)
def test_a_runner_that_cannot_be_built_is_an_error_that_names_it(worker, spec, found):
    with pytest.raises(WorkerError, match=found) as caught:
        worker.open(spec)
    assert spec.function in str(caught.value)


def test_a_runner_needs_a_colon():
    with pytest.raises(UsageError, match="module:function"):
        RunnerSpec("module.function")


def test_a_hang_costs_its_limit_and_no_more(worker):
    opened(worker, "hang")
    start = time.monotonic()
    with pytest.raises(CandidateError):
        worker.check(BAD)
    assert time.monotonic() - start < LIMITS.check + 2


@pytest.mark.quick
@pytest.mark.parametrize("error", [None, 0.5, math.inf, math.nan])
def test_an_outcome_survives_json(error):
    outcome = Outcome(BEST, "ok", "why", (1e-5, 2e-5), error, (2e-5, 2e-5), {"mhz": 1}, "d", True)
    again = Outcome.from_json(outcome.to_json())
    assert repr(again) == repr(outcome)
    assert again.ratio == pytest.approx(math.sqrt(0.5))


@pytest.mark.quick
def test_a_damaged_outcome_is_refused():
    with pytest.raises(UsageError, match="outcome"):
        Outcome.from_json({"status": "fine"})

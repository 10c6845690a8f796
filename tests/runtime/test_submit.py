"""Requests that are submitted and polled, and what observers are told."""

from __future__ import annotations

import pytest

from fake_clock import timed_loop
from fake_executor import greedy
from tilewright.errors import CapacityError, UsageError
from tilewright.runtime import SamplingParams

pytestmark = pytest.mark.quick
FOUR = SamplingParams(max_new_tokens=4)


class Notes:
    def __init__(self):
        self.requests, self.steps = [], []

    def added(self, request):
        self.requests.append(request.prompt)

    def stepped(self, chunks, started, ended):
        self.steps.append((sum(len(chunk.slots) for chunk in chunks), started, ended))


def test_a_submitted_request_is_computed_by_steps():
    loop = timed_loop()
    loop.clock.now = 3.0
    first = loop.submit([1, 2, 3], FOUR, submitted=1.0)
    loop.step()
    second = loop.submit([4], SamplingParams(max_new_tokens=2, n=2))
    assert not first.finished
    while not (first.finished and second.finished):
        loop.step()
    assert [one.token_ids for one in first.completions()] == [greedy([1, 2, 3], 4)]
    assert [one.token_ids for one in second.completions()] == [greedy([4], 2)] * 2
    timings = first.completions()[0].timings
    assert (timings.submitted, timings.queue, timings.ttft) == (1, 2, 3)
    loop.cancel(first)  # which has ended
    assert not first.abandoned and len(first.completions()) == 1
    assert loop.pool.num_free == loop.pool.num_pages - 1


def test_a_cancelled_request_leaves_nothing_behind():
    loop = timed_loop()
    gone, stays = loop.submit([1, 2], FOUR), loop.submit([3], FOUR)
    loop.step()
    loop.cancel(gone)
    while not stays.finished:
        loop.step()
    assert gone.abandoned and not gone.finished
    assert stays.completions()[0].token_ids == greedy([3], 4)
    assert loop.pool.num_free == loop.pool.num_pages - 1


def test_what_cannot_be_taken_is_refused_at_once():
    loop = timed_loop(num_pages=5)
    with pytest.raises(UsageError, match="at least one token"):
        loop.submit([])
    with pytest.raises(CapacityError, match="memory_fraction"):
        loop.submit([1] * 30)
    assert not loop.scheduler.waiting


def test_observers_see_each_request_and_each_step():
    loop = timed_loop(lambda tokens: 0.5 * tokens)
    notes = Notes()
    loop.observers.append(notes)
    loop.generate([[1, 2, 3]], SamplingParams(max_new_tokens=2))
    list(loop.stream([4], SamplingParams(max_new_tokens=1)))
    loop.submit([5])
    assert notes.requests == [[1, 2, 3], [4], [5]]
    assert notes.steps == [(3, 0.0, 1.5), (1, 1.5, 2.0), (1, 2.0, 2.5)]

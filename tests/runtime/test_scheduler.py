"""Plans and the steps made of them, without a model."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fake_executor import PAGED
from tilewright.errors import CapacityError
from tilewright.runtime import (
    Capabilities,
    GenerationLoop,
    PagedPool,
    Sampler,
    SamplingParams,
    Scheduler,
    SlotPool,
)
from tilewright.runtime.batch import build_step
from tilewright.runtime.bucketing import Padding
from tilewright.runtime.request import Request
from tilewright.runtime.sampling import Sampled
from tilewright.runtime.scheduler import CROWD

SLOTS = Capabilities(mixes=False, pages=False, shares=False, max_slots=2)


def request(length, first=0, **params):
    prompt = list(range(first, first + length))
    return Request(prompt, SamplingParams(**params), frozenset(), 100, None)


def advance(scheduler):
    """Computes a plan without a model: each sequence that is ready gets token 9."""
    plan = scheduler.schedule()
    for chunk in plan.chunks:
        chunk.seq.num_computed += len(chunk.slots)
        if not chunk.seq.remaining:
            chunk.seq.accept(Sampled(9), 1.0)
    return [(chunk.seq, len(chunk.slots)) for chunk in plan.chunks]


def add(scheduler, *requests):
    for one in requests:
        scheduler.add(one)
    return [one.sequences[0] for one in requests]


@pytest.mark.quick
def test_decode_goes_first_and_prefill_fills_the_budget():
    scheduler = Scheduler(PagedPool(50, 4), PAGED, max_tokens_per_step=10)
    a, b, c = add(scheduler, request(4), request(13), request(3))
    assert advance(scheduler) == [(a, 4), (b, 6)]
    assert advance(scheduler) == [(a, 1), (b, 7), (c, 2)]
    assert advance(scheduler) == [(a, 1), (b, 1), (c, 1)]  # c's last prompt token
    assert advance(scheduler) == [(a, 1), (b, 1), (c, 1)]


def test_first_come_first_served_even_if_a_later_one_would_fit():
    scheduler = Scheduler(PagedPool(8, 2), PAGED)
    a, b, c = add(scheduler, request(7), request(8), request(1))
    assert advance(scheduler) == [(a, 7)]
    assert scheduler.waiting == [b, c]
    scheduler.drop(a)
    assert [seq for seq, _ in advance(scheduler)] == [b, c]


def test_the_youngest_gives_way_and_comes_back_first():
    scheduler = Scheduler(PagedPool(6, 2), PAGED)
    a, b, c = add(scheduler, request(3), request(1), request(5))
    assert advance(scheduler) == [(a, 3), (b, 1)]
    assert advance(scheduler) == [(a, 1), (b, 1)]
    assert advance(scheduler) == [(a, 1), (b, 1)]
    assert scheduler.num_preemptions == 0
    advance(scheduler)
    assert advance(scheduler) == [(a, 1)]  # a takes its 4th page of 5
    assert scheduler.waiting == [b, c]
    assert scheduler.num_preemptions == 1
    scheduler.drop(a)
    assert advance(scheduler)[0] == (b, 5)  # its prompt and the four tokens it had made


def test_prompts_get_a_larger_budget_while_no_sequence_decodes():
    scheduler = Scheduler(PagedPool(50, 4), PAGED, max_tokens_per_step=4, max_prefill_tokens=10)
    a, b = add(scheduler, request(7), request(9))
    assert advance(scheduler) == [(a, 7), (b, 3)]
    assert advance(scheduler) == [(a, 1), (b, 3)]
    scheduler.drop(a)
    assert advance(scheduler) == [(b, 3)]
    scheduler = Scheduler(PagedPool(50, 4), PAGED, max_tokens_per_step=4, max_prefill_tokens=1)
    (a,) = add(scheduler, request(7))
    assert advance(scheduler) == [(a, 4)]  # never less than the budget of any step


def test_so_they_do_until_the_last_of_a_crowd_is_computed():
    scheduler = Scheduler(PagedPool(99, 4), PAGED, max_tokens_per_step=16, max_prefill_tokens=40)
    (first,) = add(scheduler, request(3))
    assert advance(scheduler) == [(first, 3)]
    crowd = add(scheduler, *(request(30) for _ in range(CROWD)))
    # Decodes come beside the budget, and so does what fills a tile of the products.
    whole = [(one, 30) for one in crowd[:5]]
    assert advance(scheduler) == [(first, 1), *whole, (crowd[5], 40 + 127 - 150)]
    decodes = [(one, 1) for one in (first, *crowd[:5])]
    assert advance(scheduler) == [*decodes, (crowd[5], 13), (crowd[6], 30), (crowd[7], 30)]
    late, later = add(scheduler, request(30), request(30))
    assert advance(scheduler)[9:] == [(late, 16 - 9)]
    scheduler.drop(late)
    assert advance(scheduler)[9:] == [(later, 16 - 9)]


def test_an_executor_that_does_not_mix_gets_prefill_alone():
    scheduler = Scheduler(SlotPool(2, 64), SLOTS, max_tokens_per_step=4)
    a, b, c = add(scheduler, request(9), request(5), request(2))
    assert advance(scheduler) == [(a, 9)]  # whole, whatever the budget
    assert advance(scheduler) == [(b, 5)]
    assert advance(scheduler) == [(a, 1), (b, 1)]  # no slot for c
    scheduler.drop(a)
    assert advance(scheduler) == [(c, 2)]
    assert advance(scheduler) == [(b, 1), (c, 1)]


@pytest.mark.quick
def test_the_step_of_a_mixed_plan():
    pool = PagedPool(50, 4)
    scheduler = Scheduler(pool, PAGED, max_tokens_per_step=9)
    add(scheduler, request(5, first=20))
    advance(scheduler)
    add(scheduler, request(3, first=10), request(20, first=30))
    step = build_step(scheduler.schedule(), pool)
    assert step.token_ids.tolist() == [9, 10, 11, 12, 30, 31, 32, 33, 34]
    assert step.positions.tolist() == [5, 0, 1, 2, 0, 1, 2, 3, 4]
    assert step.query_start.tolist() == [0, 1, 4, 9]
    assert step.seq_lens.tolist() == [6, 3, 5]
    assert step.block_tables.tolist() == [[1, 2], [3, 0], [4, 5]]
    assert step.slot_mapping.tolist() == [9, 12, 13, 14, 16, 17, 18, 19, 20]
    assert step.logits_indices.tolist() == [0, 3]  # the third prompt is not done


@given(
    lengths=st.lists(st.integers(1, 11), min_size=2, max_size=12),  # each fits alone, with 3 more
    pages=st.integers(8, 16),
    cached=st.booleans(),
)
def test_who_is_let_in_is_as_if_all_that_run_were_asked_each_time(lengths, pages, cached):
    pool = PagedPool(pages, 2, prefix_caching=cached)
    scheduler = Scheduler(pool, PAGED, max_tokens_per_step=20)
    admits = scheduler._admits
    asked = []

    def both(seq=None, wanted=None):
        asked.append(admits(seq, wanted))
        assert asked[-1] == admits(seq)
        return asked[-1]

    scheduler._admits = both
    add(scheduler, *[request(length, max_new_tokens=3) for length in lengths])
    for _ in range(6):
        advance(scheduler)
        for seq in [*scheduler.running]:
            if not seq.remaining or seq.finish_reason is None:
                scheduler.share(seq)
            if len(seq.tokens) > len(seq.request.prompt) + 2:
                scheduler.drop(seq)
    assert True in asked and False in asked


def test_a_step_of_prompt_chunks_alone_wants_no_logits():
    pool = PagedPool(50, 4)
    scheduler = Scheduler(pool, PAGED, max_tokens_per_step=3)
    add(scheduler, request(7))
    step = build_step(scheduler.schedule(), pool)
    assert step.logits_indices.shape == (0,)
    assert step.logits_indices.dtype == torch.int64


def test_pages_that_somebody_else_holds_are_an_error_not_a_hang():
    pool = PagedPool(4, 2)
    pool.add(-1)
    pool.append(-1, 5)
    scheduler = Scheduler(pool, PAGED)
    add(scheduler, request(3))
    with pytest.raises(CapacityError, match="memory_fraction"):
        scheduler.schedule()


class NoModel:
    """Constant logits at no cost, so that a step's time is the loop's own."""

    def __init__(self, capabilities):
        self.capabilities, self.padding = capabilities, Padding()
        self.logits = torch.randn(1, 50_000)

    def allocate(self, num_pages, page_size, host_pages=0):
        pass

    def run(self, step):
        return self.logits


@pytest.mark.parametrize("pool", [PagedPool(500, 16), SlotPool(2, 2048)])
def test_the_loop_itself_takes_little_time(pool):
    """About 60 µs a token, greedy, vocabulary 50k; six times that is allowed for a busy machine."""
    capabilities = PAGED if pool.shares else SLOTS
    loop = GenerationLoop(
        NoModel(capabilities), pool, Scheduler(pool, capabilities), Sampler(), None, [], 2048
    )
    result = loop.generate([[1] * 500], SamplingParams(max_new_tokens=300))[0][0]
    assert statistics.median(result.timings.itl) < 360e-6


def test_smaller_priorities_go_first_and_take_the_places_of_larger_ones():
    scheduler = Scheduler(PagedPool(50, 4), PAGED, max_num_seqs=2)
    a, b, c = add(scheduler, request(2), request(2, priority=5), request(2, priority=-1))
    assert [seq for seq, _ in advance(scheduler)] == [c, a]
    (d,) = add(scheduler, request(3))  # the same priority as a, which runs
    assert [seq for seq, _ in advance(scheduler)] == [c, a]
    (e,) = add(scheduler, request(3, priority=-2))
    assert [seq for seq, _ in advance(scheduler)] == [c, e]
    assert scheduler.waiting == [a, d, b] and scheduler.num_preemptions == 1
    scheduler.drop(c)
    assert [seq for seq, _ in advance(scheduler)] == [e, a]


def test_who_runs_gives_up_pages_to_a_smaller_priority():
    scheduler = Scheduler(PagedPool(5, 2), PAGED)
    a, b = add(scheduler, request(6), request(3))
    assert advance(scheduler) == [(a, 6)]
    (c,) = add(scheduler, request(5, priority=-1))
    assert advance(scheduler) == [(c, 5)] and scheduler.waiting == [a, b]


def test_of_one_priority_the_earliest_deadline_goes_first():
    scheduler = Scheduler(PagedPool(50, 4), PAGED, max_num_seqs=1, clock=lambda: 0.0)
    sequences = add(
        scheduler, request(2), request(2, deadline=9.0), request(2, deadline=5.0, priority=1)
    )
    assert scheduler.waiting == [sequences[1], sequences[0], sequences[2]]


def test_deadlines_end_what_runs_and_what_waits():
    now = [0.0]
    scheduler = Scheduler(PagedPool(50, 4), PAGED, max_num_seqs=1, clock=lambda: now[0])
    timed = request(2, deadline=2.0), request(2, deadline=2.5, n=2)
    a, b, c = add(scheduler, *timed, request(2))
    assert [seq for seq, _ in advance(scheduler)] == [a]
    now[0] = b.request.deadline - 0.1  # a's has passed
    assert [seq for seq, _ in advance(scheduler)] == [b]
    assert a.finish_reason == "deadline" and b.finish_reason is None
    assert a.completion().token_ids == [9] and scheduler.pool.length(b.id) == 2
    now[0] = b.request.deadline
    assert scheduler.schedule_ahead() is None
    assert b.request.finished and scheduler.running == [] and scheduler.waiting == [c]
    assert [seq for seq, _ in advance(scheduler)] == [c]
    assert c.finish_reason is None

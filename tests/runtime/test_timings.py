"""When tokens came: against times worked out by hand on a clock that stands still between steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_clock import timed_loop
from fake_decode import LazyExecutor
from fake_executor import VOCAB
from tilewright.runtime import (
    GenerationLoop,
    PagedPool,
    Sampler,
    SamplingParams,
    Scheduler,
    Timings,
)

THREE = SamplingParams(max_new_tokens=3)


@pytest.mark.quick
def test_times_of_two_requests_that_share_steps():
    loop = timed_loop(max_tokens_per_step=4)
    (first,), (second,) = loop.generate([[1, 2, 3, 4, 5, 6], [7, 8, 9]], THREE)
    # Steps of a second: 4 of the first; 2 and 2; 1 and 1; 1 and 1; 1.
    a, b = first.timings, second.timings
    assert (a.queue, a.ttft, a.itl, a.e2e) == (0, 2, [1, 1], 4)
    assert (b.queue, b.ttft, b.itl, b.e2e) == (1, 3, [1, 1], 5)
    assert (a.prefill, a.decode, a.tpot) == (2, 2, 1)
    assert (b.prefill, b.decode, b.tpot) == (2, 2, 1)
    assert a.preemptions == b.preemptions == 0


@pytest.mark.quick
def test_a_preempted_request_waits_between_two_tokens():
    loop = timed_loop(num_pages=4, page_size=2)  # three pages: six tokens
    (old,), (young,) = loop.generate([[1, 2], [3, 4]], THREE)
    # The second tokens want two more pages, and there is one: the younger one gives way. Its turn
    # comes when the other one has gone, at 3, and its two tokens are known at 4 and 5.
    assert (old.timings.itl, old.timings.preemptions) == ([1, 1], 0)
    assert (young.timings.itl, young.timings.preemptions) == ([3, 1], 1)
    assert loop.scheduler.num_preemptions == 1
    assert (young.timings.queue, young.timings.ttft, young.timings.e2e) == (0, 1, 5)
    assert young.timings.tpot == 2


@pytest.mark.quick
def test_cached_tokens_are_those_of_the_prompt_that_were_not_computed():
    loop = timed_loop(caching=True)
    prompt = list(range(10))
    assert loop.generate([prompt], THREE)[0][0].usage.cached_tokens == 0
    again = loop.generate([[*prompt[:9], 21]], THREE)[0][0]
    assert again.usage.cached_tokens == 9  # two pages, and one token of the third
    assert again.timings.queue == 0 and again.timings.ttft == 1


@pytest.mark.quick
def test_what_has_not_happened_took_no_time():
    timings = Timings(5.0)
    assert (timings.queue, timings.prefill, timings.decode, timings.e2e, timings.tpot) == (0,) * 5
    timings.scheduled = 6.0
    timings.token(8.0)
    assert (timings.queue, timings.prefill, timings.decode, timings.e2e) == (1, 2, 0, 3)
    assert timings.itl == [] and timings.tpot == 0


@settings(max_examples=20)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1),
    n=st.integers(1, 3),
    tokens=st.integers(1, 6),
    budget=st.integers(3, 20),
    lazy=st.booleans(),
)
def test_phases_add_up_to_the_whole(prompts, n, tokens, budget, lazy):
    if lazy:
        executor, pool = LazyExecutor(8, 48), PagedPool(12, 4)
        knobs = {"max_num_seqs": min(8, budget), "max_tokens_per_step": budget}
        scheduler = Scheduler(pool, executor.capabilities, **knobs)
        loop = GenerationLoop(executor, pool, scheduler, Sampler(), None, [], 48)
    else:
        loop = timed_loop(num_pages=12, max_tokens_per_step=budget)
    results = loop.generate(prompts, SamplingParams(max_new_tokens=tokens, n=n, seed=0))
    each = [one.timings for completions in results for one in completions]
    for one in each:
        assert one.queue + one.prefill + one.decode == pytest.approx(one.e2e)
        assert one.e2e == pytest.approx(one.ttft + sum(one.itl)) and len(one.itl) == tokens - 1
        assert min(one.queue, one.prefill, one.decode, *one.itl, 0) >= 0
    for completions in results:
        assert len({one.timings.scheduled for one in completions}) == 1
    assert sum(one.preemptions for one in each) == loop.scheduler.num_preemptions

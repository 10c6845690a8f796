"""Random schedules over tiny pools with a prefix cache: whatever is shared, copied, evicted,
forked, preempted, cancelled or interrupted, each request gets the tokens that it gets alone.

The executors' next token is made of all K that a sequence reads through its block table, and their
memory starts as garbage and is never cleaned. `TEST_SCHEDULES` asks for more schedules.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import lru_cache

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fake_decode import LazyExecutor
from fake_executor import PAGED, VOCAB, FakeExecutor, logits_of, seen
from tilewright.runtime import GenerationLoop, PagedPool, Sampler, SamplingParams, Scheduler
from tilewright.runtime.sampling import SamplingState
from tilewright.runtime.sliding import Sliding
from tilewright.runtime.sliding_pool import SlidingPool

MAX_LEN = 32
SCHEDULES = int(os.environ.get("TEST_SCHEDULES", "300"))
BASES = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]]

HAPPEN = (
    *("forks", "cancellations", "interrupts", "preemptions"),
    *("evictions", "evicted pins", "hits", "copies", "moved out", "moved in"),
)
SLIDE = ("drops", "forks", "preemptions", "evictions", "hits", "moved in")


@lru_cache(maxsize=4096)
def alone(prompt, count, temperature, index, slides):
    """The oracle: no pages, no batch, every token from all tokens before it that it sees."""
    params = SamplingParams(temperature=temperature, seed=5)
    state, tokens = SamplingState(params, list(prompt), frozenset(), index), list(prompt)
    for _ in range(count):
        logits = logits_of(seen(tokens, len(tokens), slides))
        token = Sampler().sample(logits[None], [state])[0].token_id
        state.commit(token)
        tokens.append(token)
    return tokens[len(prompt) :]


class _Stream:
    def __init__(self, loop, prompt, params, slides):
        self.prompt, self.params, self.tokens, self.slides = prompt, params, {}, slides
        self.deltas, self.open = loop.stream(prompt, params), True

    def read(self):
        """Whether there was more."""
        delta = next(self.deltas, None)
        if delta is not None:
            self.tokens.setdefault(delta.index, []).extend(delta.token_ids)
        return delta is not None

    def check(self):
        one = self.params
        for index, tokens in self.tokens.items():
            prompt, count = tuple(self.prompt), one.max_new_tokens
            expected = alone(prompt, count, one.temperature, index, self.slides)
            assert tokens == expected[: len(tokens)]
            assert not self.open or len(tokens) == one.max_new_tokens
        assert not self.open or len(self.tokens) == one.n


class Schedules(RuleBasedStateMachine):
    """Requests over one loop; `happened` counts over all schedules."""

    happened = Counter()
    lazy = False
    slides = None

    @initialize(
        page_size=st.sampled_from([1, 2, 3, 4]),
        extra=st.sampled_from([0, 0, 1, 2, 8]),
        budget=st.integers(2, 24),
        running=st.integers(1, 4),
        host=st.sampled_from([0, 1, 4, 16]),
    )
    def start(self, page_size, extra, budget, running, host):
        self.now = 0.0
        most, sliding = -(-MAX_LEN // page_size), None
        if self.slides is not None:
            sliding = Sliding(page_size, *self.slides, chunk=4)
            most = sliding.most_pages
        pages = 1 + most + extra
        executor = FakeExecutor(PAGED, slides=self.slides)
        if self.lazy:
            executor = LazyExecutor(4, most * page_size, self.slides)
        options = {"prefix_caching": True, "host_pages": host, "clock": lambda: self.now}
        if sliding is None:
            self.pool = PagedPool(pages, page_size, **options)
        else:
            self.pool = SlidingPool(pages, sliding, **options)
        scheduler = Scheduler(
            self.pool, executor.capabilities, max_tokens_per_step=budget, max_num_seqs=running
        )
        self.loop = GenerationLoop(
            executor, self.pool, scheduler, Sampler(), None, [], MAX_LEN, VOCAB
        )
        self.streams = []
        self.interrupted = 0

    @rule(
        base=st.sampled_from(BASES),
        cut=st.integers(1, 12),
        tail=st.lists(st.integers(0, 2), max_size=4),
        count=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 3]),
        ttl=st.sampled_from([None, None, None, 3.0]),
        space=st.sampled_from(["", "", "other"]),
        priority=st.sampled_from([0, 0, 0, 1]),
    )
    def arrive(self, base, cut, tail, count, n, ttl, space, priority):
        params = SamplingParams(
            max_new_tokens=count,
            n=n,
            temperature=0.0 if n == 1 else 1.25,  # so that forks go their own ways
            seed=5,
            cache_ttl=ttl,
            cache_namespace=space,
            priority=priority,
        )
        self.streams.append(_Stream(self.loop, base[:cut] + tail, params, self.slides))
        self.happened["forks"] += n > 1
        self.read(self.streams[-1])

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, 9), times=st.integers(1, 4))
    def advance(self, which, times):
        stream = self.streams[which % len(self.streams)]
        for _ in range(times):
            if stream in self.streams:
                self.read(stream)

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, 9))
    def cancel(self, which):
        stream = self.streams.pop(which % len(self.streams))
        before = len(self.loop.scheduler.running)
        stream.deltas.close()
        stream.open = False
        stream.check()
        self.happened["cancellations"] += len(self.loop.scheduler.running) < before

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, 9), late=st.booleans(), calls=st.integers(1, 4))
    def interrupt(self, which, late, calls):
        preemptions = self.loop.scheduler.num_preemptions
        executor = self.loop.executor
        at = executor.graphs.queue if self.lazy else executor
        at.fail_at, at.fail_late = (at.calls if self.lazy else at.num_steps) + calls, late
        try:
            self.read(self.streams[which % len(self.streams)])
        except KeyboardInterrupt:
            self.streams.pop(which % len(self.streams)).open = False
            self.happened["interrupts"] += 1
        at.fail_at = None
        self.interrupted += self.loop.scheduler.num_preemptions - preemptions

    @rule()
    def wait(self):
        self.now += 1.0

    def read(self, stream):
        if not stream.read():
            self.streams.remove(stream)
            stream.check()

    @invariant()
    def namespaces_hold_no_page_together(self):
        holders = {}
        for seq in self.loop.scheduler.running:
            for page in self.pool._held[seq.id]:
                holders.setdefault(page, set()).add(seq.request.namespace)
        assert all(len(spaces) == 1 for spaces in holders.values())

    @invariant()
    def the_references_are_those_of_holders(self):
        counted = Counter(page for held in self.pool._held.values() for page in held)
        nodes = self.pool._cache.tree._device
        cached = [page for node in nodes for page in node.pages[: node.on_device]]
        assert len(cached) == len(set(cached)) == self.pool._cache.tree.num_pages
        counted.update(cached)
        for page, references in enumerate(self.pool._pages.references):
            assert references == counted[page]
        idle = [page for page in cached if counted[page] == 1]
        assert self.pool.num_available == self.pool.num_free + len(idle)
        assert self.pool.num_free == self.pool.num_pages - 1 - len(counted)

    def teardown(self):
        for stream in list(self.streams):
            while stream in self.streams:
                self.read(stream)
        loop, pool = self.loop, self.pool
        assert not loop.scheduler.running and not loop.scheduler.waiting and not pool._held
        cached = pool._cache.tree.num_pages
        assert pool._pages.references.count(1) == cached == sum(pool._pages.references)
        assert pool.num_available == pool.num_pages - 1 and pool.waste() == 0
        counters = pool.prefix_counters
        self.happened["preemptions"] += loop.scheduler.num_preemptions - self.interrupted
        self.happened["evictions"] += counters.evicted_pages
        self.happened["evicted pins"] += counters.evicted_pinned_pages
        self.happened["moved out"] += counters.moved_out_pages
        self.happened["moved in"] += counters.moved_in_pages
        self.happened["hits"] += counters.hit_tokens
        self.happened["copies"] += loop.counters.copied_pages
        self.happened["drops"] += pool.num_dropped if pool.slides else 0
        self.happened["groups"] += loop.executor.decoding.shared_runs if self.lazy else 0
        pool.clear_cache()
        assert pool.num_free == pool.num_pages - 1 and not any(pool._pages.references)


class LaunchedAhead(Schedules):
    happened = Counter()
    lazy = True


class Sliding6(Schedules):
    """Sequences that let go of pages between two sinks and a window of 6."""

    happened = Counter()
    slides = (6, 2)


class SlidingAhead(Sliding6):
    happened = Counter()
    lazy = True


def test_a_sequence_let_in_again_is_read_on_its_new_pages():
    """Found among 10,000 schedules: a step of the same sequences as the one before, of which one
    was preempted and let in again with one token to compute."""
    state, base = LaunchedAhead(), BASES[0]
    state.start(page_size=1, extra=0, budget=6, running=4, host=0)
    rest = {"n": 3, "ttl": None, "space": "", "priority": 0}
    state.arrive(base=base, cut=1, tail=[], count=8, **rest)
    state.arrive(base=base, cut=12, tail=[0], count=11, **rest)
    state.teardown()


@pytest.mark.parametrize(
    ("machine", "share"),
    [(Schedules, 2 / 3), (LaunchedAhead, 1 / 3), (Sliding6, 1 / 12), (SlidingAhead, 1 / 15)],
)
def test_tokens_are_those_of_each_request_alone(machine, share):
    machine.happened.clear()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=round(SCHEDULES * share), stateful_step_count=16, deadline=None
        ),
    )
    wanted = HAPPEN if machine.slides is None else SLIDE
    wanted += ("groups",) if machine is LaunchedAhead else ()
    assert all(machine.happened[one] for one in wanted), machine.happened

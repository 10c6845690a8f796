"""Random schedules of requests over one engine: arrivals, cancellations, forks, preemptions, pages
that go to the host and come back. Each request's greedy tokens are those of its prompt alone.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from tilewright.runtime import GenerationLoop, PagedPool, Sampler, SamplingParams, Scheduler
from tilewright.runtime.executor import PagedExecutor

MAX_LEN, PAGE, MOST = 48, 4, 16
BASES = [[(7 * i + 3 * base) % 150 + 3 for i in range(20)] for base in range(3)]
HAPPEN = ("forks", "cancellations", "preemptions", "evictions", "hits", "moved out", "moved in")


class Schedule:
    """One random schedule over a pool that is nearly too small.

    Args:
        engine: a causal LM, whose weights and kernels are used, but not its pool.
        alone: the first MOST greedy tokens behind a prompt.
        rng: decides what comes.
        happened: what came is added to it.
    """

    def __init__(
        self,
        engine,
        alone: Callable[[tuple[int, ...]], list[int]],
        rng: random.Random,
        happened: Counter[str],
    ) -> None:
        self.alone, self.rng, self.happened = alone, rng, happened
        decode = engine.executor._decode
        executor = PagedExecutor(engine.runner, 4, MAX_LEN, MAX_LEN, decode=decode)
        pages = 1 + -(-MAX_LEN // PAGE) + rng.choice([0, 1, 4, 20])
        host = rng.choice([0, 2, 12])
        self.pool = PagedPool(pages, PAGE, prefix_caching=True, host_pages=host)
        budget, most = rng.randint(2, 40), rng.randint(1, 4)
        scheduler = Scheduler(
            self.pool, executor.capabilities, max_tokens_per_step=budget, max_num_seqs=most
        )
        config = engine.config
        self.loop = GenerationLoop(
            executor, self.pool, scheduler, Sampler(), None, [], MAX_LEN, config.vocab_size
        )
        self.open: list[tuple[list[int], SamplingParams, dict[int, list[int]], object]] = []

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.rng.choice([self.arrive, self.advance, self.advance, self.cancel])()
        while self.open:
            self.advance()
        loop, pool, counters = self.loop, self.pool, self.pool.prefix_counters
        assert not loop.scheduler.running and not loop.scheduler.waiting
        assert pool.num_available == pool.num_pages - 1
        pool.clear_cache()
        assert pool.num_free == pool.num_pages - 1
        self.happened["preemptions"] += loop.scheduler.num_preemptions
        self.happened["evictions"] += counters.evicted_pages
        self.happened["hits"] += counters.hit_tokens
        self.happened["moved out"] += counters.moved_out_pages
        self.happened["moved in"] += counters.moved_in_pages

    def arrive(self) -> None:
        base = self.rng.choice(BASES)[: self.rng.choice([1, 6, 13, 20])]
        prompt = base + [self.rng.randint(3, 4) for _ in range(self.rng.randint(0, 2))]
        n = self.rng.choice([1, 1, 1, 2])
        count, priority = self.rng.randint(1, MOST), self.rng.choice([0, 0, 1])
        params = SamplingParams(max_new_tokens=count, ignore_eos=True, n=n, priority=priority)
        self.open.append((prompt, params, {}, self.loop.stream(prompt, params)))
        self.happened["forks"] += n > 1

    def advance(self) -> None:
        if not self.open:
            return
        one = self.rng.choice(self.open)
        prompt, params, tokens, deltas = one
        for _ in range(self.rng.randint(1, 6)):
            delta = next(deltas, None)
            if delta is None:
                assert {len(found) for found in tokens.values()} == {params.max_new_tokens}
                assert len(tokens) == params.n
                self.open.remove(one)
                break
            tokens.setdefault(delta.index, []).extend(delta.token_ids)
        self.check(one)

    def cancel(self) -> None:
        if not self.open:
            return
        one = self.open.pop(self.rng.randrange(len(self.open)))
        one[3].close()
        self.check(one)
        self.happened["cancellations"] += 1

    def check(self, one) -> None:
        prompt, params, tokens, _ = one
        expected = self.alone(tuple(prompt))
        for found in tokens.values():
            assert found == expected[: len(found)], (prompt, params)

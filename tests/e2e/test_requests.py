"""Many requests over one engine, at random: each gets the tokens that Hugging Face gives it alone.

As `tests/runtime/test_prefix_schedules.py`, with a real model, real memory and real copies.
`TEST_SCHEDULES` asks for more schedules.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

import tilewright as tw
from tilewright.errors import UsageError
from tilewright.runtime import GenerationLoop, PagedPool, Sampler, SamplingParams, Scheduler
from tilewright.runtime.executor import PagedExecutor
from tiny_models import greedy, tiny_model

MAX_LEN, PAGE, MOST = 48, 4, 16
SCHEDULES = max(1, int(os.environ.get("TEST_SCHEDULES", "300")) // 10)
BASES = [[(7 * i + 3 * base) % 150 + 3 for i in range(20)] for base in range(3)]
HAPPEN = ("forks", "cancellations", "preemptions", "evictions", "hits", "moved out", "moved in")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def engine(model):
    cache = tw.KVCacheConfig(page_size=PAGE, swap_space=0.25)
    return tw.compile(
        model, target="cpu", backend="eager", kv_cache=cache, max_model_len=MAX_LEN, verify="off"
    )


@pytest.fixture(scope="module")
def alone(model):
    @lru_cache(maxsize=4096)
    def tokens(prompt: tuple[int, ...]) -> list[int]:
        return greedy(model, list(prompt), MOST)

    return tokens


class _Schedule:
    """One random schedule over a pool that is nearly too small."""

    def __init__(self, engine, alone, rng: random.Random, happened: Counter[str]) -> None:
        self.alone, self.rng, self.happened = alone, rng, happened
        executor = PagedExecutor(engine.runner, 4, MAX_LEN)
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


def test_tokens_are_those_of_hugging_face_alone(engine, alone) -> None:
    happened: Counter[str] = Counter()
    for seed in range(SCHEDULES):
        _Schedule(engine, alone, random.Random(seed), happened).run(12)
    assert all(happened[one] for one in HAPPEN), happened


def test_what_does_not_fit_comes_back_from_the_host(engine, model) -> None:
    engine.reset_prefix_cache()
    prompts = [[(11 * i + 5 * j) % 150 + 3 for j in range(40)] for i in range(16)]
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    expected = [greedy(model, prompt, 3) for prompt in prompts]
    for cached in (0, 36):  # nine whole pages; the last token's logits are wanted
        found = engine.generate(prompts, params)
        assert [one.token_ids for one in found] == expected
        assert {one.usage.cached_tokens for one in found} <= {cached, cached + 3}
    assert engine.counters.prefix.moved_in_pages > 0


def test_the_cache_is_as_it_was_compiled_or_loaded(engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "engine")
    same = tw.load(tmp_path / "engine")
    assert same.pool.caches and same.pool.host_pages == engine.pool.host_pages > 0
    other = tw.load(tmp_path / "engine", prefix_caching=False, swap_space=0)
    prompt, params = BASES[0], SamplingParams(max_new_tokens=2, ignore_eos=True)
    for _ in range(2):
        assert other.generate([prompt], params)[0].usage.cached_tokens == 0
    assert not other.pool.caches and other.pool.host_pages == 0


@pytest.mark.parametrize(
    ("field", "value"), [("prefix_caching", 1), ("swap_space", -1.0), ("swap_space", True)]
)
def test_what_a_cache_cannot_be_is_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"KVCacheConfig.{field}"):
        tw.compile(tiny_model("llama"), kv_cache=tw.KVCacheConfig(**{field: value}))

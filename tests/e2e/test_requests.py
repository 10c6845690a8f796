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
from random_schedules import BASES, HAPPEN, MAX_LEN, MOST, PAGE, Schedule
from tilewright.errors import UsageError
from tilewright.runtime import SamplingParams
from tiny_models import greedy, tiny_model

SCHEDULES = max(1, int(os.environ.get("TEST_SCHEDULES", "200")) // 10)


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


def test_tokens_are_those_of_hugging_face_alone(engine, alone) -> None:
    happened: Counter[str] = Counter()
    for seed in range(SCHEDULES):
        Schedule(engine, alone, random.Random(seed), happened).run(12)
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

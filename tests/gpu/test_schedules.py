"""Many requests over one engine on a GPU, at random: each gets the tokens that it gets alone."""

from __future__ import annotations

import os
import random
from collections import Counter
from functools import lru_cache

import pytest

import tilewright as tw
from random_schedules import HAPPEN, MAX_LEN, MOST, PAGE, Schedule
from tiny_models import tiny_model

pytestmark = pytest.mark.gpu
SCHEDULES = int(os.environ.get("TEST_SCHEDULES", "200"))


def test_tokens_are_those_of_each_request_alone() -> None:
    engine = tw.compile(
        tiny_model("llama"),
        backend="triton",
        dtype="bfloat16",
        kv_cache=tw.KVCacheConfig(page_size=PAGE, swap_space=0.25, prefix_caching=False),
        max_model_len=MAX_LEN,
        max_batch_size=4,
        deterministic=True,
    )
    params = tw.SamplingParams(max_new_tokens=MOST, ignore_eos=True)

    @lru_cache(maxsize=4096)
    def alone(prompt: tuple[int, ...]) -> list[int]:
        return engine.generate([list(prompt)], params)[0].token_ids

    happened: Counter[str] = Counter()
    for seed in range(SCHEDULES):
        Schedule(engine, alone, random.Random(seed), happened).run(12)
    print(f"{SCHEDULES} schedules: {dict(happened)}")
    assert all(happened[one] for one in HAPPEN), happened

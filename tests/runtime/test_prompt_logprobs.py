"""Logprobs of prompts, however these are computed, against the model without pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_executor import PAGED, VOCAB, FakeExecutor, greedy, logits_of
from tilewright.errors import UsageError, VerificationError
from tilewright.runtime import (
    Capabilities,
    GenerationLoop,
    PagedPool,
    Sampler,
    SamplingParams,
    Scheduler,
    SlotPool,
)
from tilewright.runtime.prompt_logprobs import token_logprobs
from tilewright.runtime.scheduler import SCORED_TOKENS

MAX_LEN = 400
SLOTS = Capabilities(mixes=False, pages=False, shares=False, max_slots=3)


def make_loop(num_pages=200, capabilities=PAGED, caching=False, logits=logits_of, **knobs):
    executor = FakeExecutor(capabilities, logits=logits)
    pool = PagedPool(num_pages, 4, prefix_caching=caching)
    if not capabilities.pages:
        pool = SlotPool(3, MAX_LEN)
    scheduler = Scheduler(pool, capabilities, **knobs)
    return GenerationLoop(executor, pool, scheduler, Sampler(), None, [], MAX_LEN, VOCAB)


def check(prompt, found, count, start=0):
    """Float64 of the model's own logits is the oracle."""
    first = min(max(1, start), len(prompt))
    assert found[:first] == [None] * first and len(found) == len(prompt)
    for place, one in enumerate(found[first:], first):
        exact = logits_of(prompt[:place]).double().log_softmax(-1)
        assert one.token_id == prompt[place]
        assert one.logprob == pytest.approx(float(exact[prompt[place]]), abs=1e-9)
        best = exact.topk(count)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-9)


@settings(max_examples=15)
@given(
    prompts=st.lists(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=4
    ),
    asked=st.lists(st.sampled_from([None, 0, 3]), min_size=4, max_size=4),
    start=st.integers(0, 22),
    n=st.integers(1, 2),
    budget=st.integers(1, 12),
    extra=st.integers(0, 10),
    caching=st.booleans(),
)
def test_they_are_the_models_and_change_no_token(prompts, asked, start, n, budget, extra, caching):
    longest = max(map(len, prompts)) + 6
    loop = make_loop(2 + longest // 4 + extra, max_tokens_per_step=budget, caching=caching)
    given = {"max_new_tokens": 6, "n": n, "prompt_logprobs_start": start}
    params = [SamplingParams(prompt_logprobs=a, **given) for a in asked]
    for _ in range(2):  # a second time there may be something in the cache
        results = loop.generate(prompts, params[: len(prompts)])
        for prompt, count, completions in zip(prompts, asked, results, strict=False):
            for one in completions:
                assert one.token_ids == greedy(prompt, 6)
                if count is None:
                    assert one.prompt_logprobs is None
                else:
                    check(prompt, one.prompt_logprobs, count, start)


@pytest.mark.parametrize(("start", "cached"), [(0, 0), (1, 0), (3, 2), (5, 4), (9, 8), (14, 12)])
def test_what_comes_before_their_start_may_be_cached(start, cached):
    loop = make_loop(caching=True)
    prompt = [1 + place % 7 for place in range(13)]
    loop.generate([prompt], SamplingParams(max_new_tokens=4))
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=2, prompt_logprobs_start=start)
    ((one,),) = loop.generate([prompt], params)
    check(prompt, one.prompt_logprobs, 2, start)
    assert one.usage.cached_tokens == cached


def test_preempted_prompts_keep_what_they_know():
    loop = make_loop(num_pages=12, max_tokens_per_step=6)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [5, 6], [7, 8, 9, 1, 2, 3]]
    params = SamplingParams(max_new_tokens=28, prompt_logprobs=1)
    for prompt, (one,) in zip(prompts, loop.generate(prompts, params), strict=True):
        check(prompt, one.prompt_logprobs, 1)
        assert one.token_ids == greedy(prompt, 28)
    assert loop.scheduler.num_preemptions > 0


def test_slots_and_prompts_of_one_token():
    params = SamplingParams(max_new_tokens=2, prompt_logprobs=2)
    for capabilities in (SLOTS, PAGED):
        long, short = make_loop(capabilities=capabilities).generate([[3, 1, 4, 1], [5]], params)
        check([3, 1, 4, 1], long[0].prompt_logprobs, 2)
        assert short[0].prompt_logprobs == [None]


def test_a_long_prompt_gives_its_logits_in_chunks():
    prompt = [place % VOCAB for place in range(SCORED_TOKENS + 40)]
    loop = make_loop()
    (one,) = loop.generate([prompt], SamplingParams(max_new_tokens=1, prompt_logprobs=0))[0]
    check(prompt, one.prompt_logprobs, 0)
    assert loop.executor.most_tokens == SCORED_TOKENS
    loop.generate([prompt], SamplingParams(max_new_tokens=1))
    assert loop.executor.most_tokens == len(prompt)


def test_cached_prefixes_are_not_reused_but_kept():
    loop, prompt = make_loop(caching=True), list(range(20))
    plain, asked = (SamplingParams(max_new_tokens=1, prompt_logprobs=k) for k in (None, 1))
    cached = [
        loop.generate([prompt], params)[0][0].usage.cached_tokens
        for params in (asked, plain, asked)
    ]
    assert cached[0] == cached[2] == 0
    assert cached[1] >= 16


def test_a_stream_has_no_place_for_them():
    with pytest.raises(UsageError, match="prompt_logprobs: expected None, in a stream"):
        make_loop().stream([1, 2], SamplingParams(prompt_logprobs=1))


def test_logits_that_are_no_numbers_are_refused():
    def broken(tokens):
        return logits_of(tokens) * (torch.nan if len(tokens) == 2 else 1.0)

    loop = make_loop(logits=broken)
    assert loop.generate([[1, 2, 3]], SamplingParams(max_new_tokens=1))
    with pytest.raises(VerificationError, match="finite largest logit"):
        loop.generate([[1, 2, 3]], SamplingParams(max_new_tokens=1, prompt_logprobs=0))
    assert loop.pool.num_free == loop.pool.num_pages - 1


@pytest.mark.parametrize(("rows", "count"), [(1, 0), (32, 3), (33, 9), (80, 7)])
def test_blocks_are_rows(rows, count):
    logits = torch.randn(rows, 7)
    tokens = torch.randint(7, (rows,)).tolist()
    found = token_logprobs(logits, tokens, count)
    exact = logits.double().log_softmax(-1)
    assert [one.token_id for one in found] == tokens
    assert all(len(one.top) == min(count, 7) for one in found)
    torch.testing.assert_close(
        torch.tensor([one.logprob for one in found], dtype=torch.float64),
        exact[range(rows), tokens],
    )

"""Logits that are no numbers: they end their own request, and change nothing for the others."""

from __future__ import annotations

import pytest
import torch

from fake_executor import VOCAB, FakeExecutor, greedy, logits_of
from tilewright.errors import KernelError, VerificationError
from tilewright.runtime import (
    GenerationLoop,
    PagedPool,
    Sampler,
    SamplingParams,
    Scheduler,
)
from tilewright.runtime.metrics import Metrics

BAD, EIGHT = [9, 9], SamplingParams(max_new_tokens=8)
OTHERS = [[1, 2, 3], [4], [5] * 7]


def broken_after(count: int):
    """A model whose logits are NaN for what begins with BAD, from so many tokens on."""

    def logits(tokens: list[int]) -> torch.Tensor:
        broken = tokens[:2] == BAD and len(tokens) >= count
        return logits_of(tokens) * (torch.nan if broken else 1.0)

    return logits


def loop_over(count: int, num_pages: int = 200) -> GenerationLoop:
    pool = PagedPool(num_pages, 4, prefix_caching=True)
    executor = FakeExecutor(logits=broken_after(count))
    scheduler = Scheduler(pool, executor.capabilities)
    return GenerationLoop(executor, pool, scheduler, Sampler(), None, [], 48, vocab_size=VOCAB)


def check_idle(loop: GenerationLoop) -> None:
    assert not loop.scheduler.running and not loop.scheduler.waiting
    assert loop.pool.num_available == loop.pool.num_pages - 1


@pytest.mark.quick
@pytest.mark.parametrize("count", [2, 3, 6])  # with the prompt, with the first token, later
def test_the_others_go_on_as_if_nothing_had_been(count: int) -> None:
    loop = loop_over(count)
    metrics = Metrics(loop, "m")
    others = [loop.submit(prompt, EIGHT) for prompt in OTHERS]
    broken = loop.submit(BAD, EIGHT)
    while not all(one.finished for one in others):
        loop.step()
    assert [one.completions()[0].token_ids for one in others] == [greedy(p, 8) for p in OTHERS]
    assert loop.counters.steps == 8 and loop.scheduler.num_preemptions == 0
    assert loop.counters.recomputed_tokens == 0
    (seq,) = broken.sequences
    assert (seq.finish_reason, seq.tokens) == ("error", BAD + greedy(BAD, count - 2))
    with pytest.raises(VerificationError, match=f"the request behind {count} tokens.*finite"):
        broken.completions()
    metrics.refresh()
    assert metrics.finished["error"] == 1 and metrics.finished["length"] == 3
    assert metrics.histograms["e2e_request_latency_seconds"].counts.sum() == 3
    check_idle(loop)


def test_a_launch_that_was_given_up_is_the_error_and_is_made_good() -> None:
    loop = loop_over(3)
    given_up = KernelError("a launch", expected="an end", found="none", remedy="None.")
    errors = [given_up]
    loop.executor.recover = lambda: errors.pop() if errors else None
    other = loop.submit(OTHERS[0], EIGHT)
    broken = [loop.submit(BAD, EIGHT) for _ in range(2)]
    while not other.finished:
        loop.step()
    for one in broken:
        with pytest.raises(KernelError) as caught:
            one.completions()
        assert caught.value is given_up
    assert not errors
    assert other.completions()[0].token_ids == greedy(OTHERS[0], 8)
    check_idle(loop)


def test_generate_names_the_prompt_when_the_others_have_ended() -> None:
    loop = loop_over(4)
    with pytest.raises(VerificationError, match="prompt 1 of 3"):
        loop.generate([OTHERS[0], BAD, OTHERS[1]], EIGHT)
    assert loop.counters.tokens_computed == 3 + 7 + 1 + 7 + len(BAD) + 2
    check_idle(loop)


def test_siblings_end_together() -> None:
    """Both draw from the prompt's row; one of them alone meets NaN later, by its own tokens."""
    params = SamplingParams(max_new_tokens=8, n=2, temperature=1.0, seed=4)
    loop = loop_over(2)
    with pytest.raises(VerificationError, match="behind 2 tokens"):
        loop.generate([BAD], params)
    check_idle(loop)
    second = loop_over(99)
    drawn = [one.token_ids for one in second.generate([BAD], params)[0]]
    assert drawn[0] != drawn[1]
    for which in (0, 1):
        seen = BAD + drawn[which][:5]
        loop = loop_over(99)
        loop.executor.logits = lambda tokens, seen=seen: (
            logits_of(tokens) * (torch.nan if tokens == seen else 1.0)
        )
        request, other = loop.submit(BAD, params), loop.submit(OTHERS[0], EIGHT)
        while not request.finished:
            loop.step()
        assert loop.counters.steps == 6
        assert {seq.finish_reason for seq in request.sequences} == {"error"}
        while not other.finished:
            loop.step()
        assert other.completions()[0].token_ids == greedy(OTHERS[0], 8)
        check_idle(loop)


def test_a_stream_ends_behind_the_tokens_that_it_had() -> None:
    loop = loop_over(5)
    kept, broken = loop.stream(OTHERS[0], EIGHT), loop.stream(BAD, EIGHT)
    tokens = list(next(kept).token_ids)
    seen: list[int] = []
    with pytest.raises(VerificationError, match="behind 5 tokens"):
        for delta in broken:
            seen += delta.token_ids
    assert seen == greedy(BAD, 3)
    tokens += [token for delta in kept for token in delta.token_ids]
    assert tokens == greedy(OTHERS[0], 8)
    check_idle(loop)


def test_what_it_computed_is_not_cached() -> None:
    loop = loop_over(2)
    prompt = BAD * 4
    with pytest.raises(VerificationError):
        loop.generate([prompt], EIGHT)
    loop.executor.logits = logits_of
    (found,) = loop.generate([prompt], EIGHT)[0]
    assert found.token_ids == greedy(prompt, 8) and found.usage.cached_tokens == 0


def test_logprobs_of_a_broken_prompt_end_it_alone() -> None:
    loop = loop_over(1)
    wanted = SamplingParams(max_new_tokens=8, prompt_logprobs=0)
    broken, kept = loop.submit([9, 9, 1, 2], wanted), loop.submit(OTHERS[0], wanted)
    loop.executor.logits = lambda tokens: (
        logits_of(tokens) * (torch.nan if tokens == [9, 9] else 1.0)
    )
    while not kept.finished:
        loop.step()
    assert kept.completions()[0].token_ids == greedy(OTHERS[0], 8)
    with pytest.raises(VerificationError, match="finite"):
        broken.completions()
    check_idle(loop)

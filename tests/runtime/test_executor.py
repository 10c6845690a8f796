"""Executors under a real model: any schedule gives the tokens of one prompt alone."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewright as tw
from e2e.models import CONTEXT, GPT, VOCAB, greedy_without_cache, moved_off_init
from tilewright.errors import CapacityError, UnsupportedError, UsageError, VerificationError
from tilewright.runtime.bucketing import LengthBuckets
from tilewright.runtime.executor import PagedExecutor, SlotExecutor
from tilewright.runtime.loop import GenerationLoop
from tilewright.runtime.pool import PagedPool
from tilewright.runtime.sampling import Sampler
from tilewright.runtime.scheduler import Scheduler
from tilewright.runtime.slot_pool import SlotPool

EXAMPLE = (torch.zeros(1, 8, dtype=torch.int64),)


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(1)
    return moved_off_init(GPT())


@pytest.fixture(scope="module")
def oracle(gpt):
    """The greedy continuation of a prompt, each computed once."""
    known: dict[tuple[int, ...], list[int]] = {}

    def continued(prompt: list[int], count: int) -> list[int]:
        key = tuple(prompt)
        if len(known.get(key, ())) < count:
            known[key] = greedy_without_cache(gpt, prompt, 16)
        return known[key][:count]

    return continued


@pytest.fixture(
    scope="module", params=[("eager", "paged"), ("eager", "static"), ("onnxruntime", "static")]
)
def engine(request: pytest.FixtureRequest, gpt) -> tw.Engine:
    backend, kind = request.param
    config = tw.KVCacheConfig(kind, page_size=4)
    return tw.compile(gpt, EXAMPLE, backend=backend, kv_cache=config, max_batch_size=4)


def prompt_of(length: int) -> list[int]:
    return [(7 * i + length) % VOCAB for i in range(length)]


REQUESTS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=7
)


@settings(max_examples=12)
@given(requests=REQUESTS)
def test_any_mix_of_requests_gives_each_its_own_tokens(engine, oracle, requests) -> None:
    prompts = [prompt_of(length) for length, _, _ in requests]
    params = [tw.SamplingParams(max_new_tokens=count, n=n) for _, count, n in requests]
    found = [completion.token_ids for completion in engine.generate(prompts, params)]
    expected = [
        oracle(prompt, count)
        for prompt, (_, count, n) in zip(prompts, requests, strict=True)
        for _ in range(n)
    ]
    assert found == expected


def test_prompts_of_one_bucket_are_padded_to_the_longest_and_no_more(engine, oracle) -> None:
    """By hand: the first wave is 20, 21 and 19 tokens, and 7 alone; the second 8 and 9, and 2."""
    lengths, loop = (20, 7, 21, 19, 8, 2, 9), engine.loop
    prompts = [prompt_of(length) for length in lengths]
    buckets, slots = loop.scheduler.buckets, engine.config.kv_cache == "slot"
    padded: dict[str, int] = {}
    for way, by in {
        "bucketed": buckets,
        "arrival": slots and LengthBuckets((CONTEXT,)),
        "continuous": None,
    }.items():
        loop.scheduler.buckets = by or None
        before = engine.counters.padding_tokens
        found = engine.generate(prompts, tw.SamplingParams(max_new_tokens=4))
        assert [one.token_ids for one in found] == [oracle(prompt, 4) for prompt in prompts]
        padded[way] = engine.counters.padding_tokens - before
    loop.scheduler.buckets = buckets
    bucketed = (21 - 20) + (21 - 19) + (9 - 8)
    arrival = (21 - 20) + (21 - 7) + (21 - 19) + (9 - 8) + (9 - 2)
    wanted = {"bucketed": bucketed, "arrival": arrival, "continuous": 0}
    assert padded == (wanted if slots else dict.fromkeys(wanted, 0))


def test_interleaved_streams(engine, oracle) -> None:
    prompts = [prompt_of(length) for length in (3, 9, 5)]
    params = [tw.SamplingParams(max_new_tokens=count) for count in (12, 5, 8)]
    streams = [engine.stream(p, q) for p, q in zip(prompts, params, strict=True)]
    found: list[list[int]] = [[] for _ in streams]
    live = list(range(len(streams)))
    while live:
        for index in list(live):
            delta = next(streams[index], None)
            if delta is None:
                live.remove(index)
            else:
                found[index] += delta.token_ids
    assert found == [oracle(p, q.max_new_tokens) for p, q in zip(prompts, params, strict=True)]


def loop_over(engine: tw.Engine, executor, pool) -> GenerationLoop:
    scheduler = Scheduler(pool, executor.capabilities, max_num_seqs=4)
    return GenerationLoop(executor, pool, scheduler, Sampler(), None, (), CONTEXT)


def test_a_pool_too_small_for_all_preempts_and_still_agrees(gpt, oracle) -> None:
    engine = tw.compile(gpt, EXAMPLE, backend="eager", kv_cache="paged")
    loop = loop_over(engine, PagedExecutor(engine.runner), PagedPool(9, 4))
    prompts = [prompt_of(length) for length in (6, 9, 12)]
    params = tw.SamplingParams(max_new_tokens=14)
    found = loop.generate(prompts, params)
    assert [one[0].token_ids for one in found] == [oracle(prompt, 14) for prompt in prompts]
    assert loop.counters.recomputed_tokens > 0
    with pytest.raises(CapacityError, match="at most 32 tokens"):
        loop.generate([prompt_of(40)], params)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_slots_with_gaps_leave_nothing_behind(gpt, oracle, backend: str) -> None:
    engine = tw.compile(gpt, EXAMPLE, backend=backend, kv_cache="static", max_batch_size=4)
    executor, pool = SlotExecutor(engine.runner, 4), SlotPool(4, CONTEXT)
    loop = loop_over(engine, executor, pool)
    for tensor in executor.caches.tensors.values():
        tensor.fill_(torch.nan)
    prompts = [prompt_of(length) for length in (5, 6, 7, 8)]
    counts = (12, 2, 9, 3)
    params = [tw.SamplingParams(max_new_tokens=count) for count in counts]
    found = loop.generate(prompts, params)
    expected = [oracle(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    assert [one[0].token_ids for one in found] == expected


def test_a_token_that_gives_nan_ends_its_request_and_no_other(engine, gpt, oracle) -> None:
    if engine.image.backend == "onnxruntime":
        pytest.skip("its weights are in its session")
    good = [prompt_of(length) for length in (5, 9, 20)]
    expected = [oracle(prompt, 6) for prompt in good]
    poison = next(t for t in range(VOCAB) if not any(t in row for row in [*good, *expected]))
    table = gpt.tokens.weight.detach()
    held = [t for t in engine.runner.constants.values() if t.shape == table.shape]
    (row,) = [t[poison] for t in held if torch.equal(t, table)]
    preemptions, kept = engine.loop.scheduler.num_preemptions, row.clone()
    params = tw.SamplingParams(max_new_tokens=6)
    row.fill_(torch.nan)
    try:
        bad = [7, poison, 7, 7, 7]
        requests = [engine.loop.submit(prompt, params) for prompt in (*good[:2], bad, good[2])]
        with pytest.raises(VerificationError, match="prompt 1 of 2 behind 5 tokens"):
            engine.generate([good[0], bad], params)
        while not all(one.finished for one in requests):
            engine.loop.step()
    finally:
        row.copy_(kept)
    assert requests.pop(2).sequences[0].finish_reason == "error"
    assert [one.completions()[0].token_ids for one in requests] == expected
    assert engine.loop.scheduler.num_preemptions == preemptions


def test_batching_is_chosen_at_load_and_not_kept(engine, tmp_path) -> None:
    path, paged = tmp_path / "engine", engine.config.kv_cache == "paged"
    engine.save(path)
    assert "batching" not in json.loads((path / "manifest.json").read_text())["lm"]
    if paged:
        with pytest.raises(UnsupportedError, match="batching='bucketed'.*paged cache"):
            tw.load(path, batching="bucketed")
    else:
        assert tw.load(path, batching="continuous").loop.scheduler.buckets is None
        assert tw.load(path).loop.scheduler.buckets == engine.loop.scheduler.buckets is not None
    with pytest.raises(UsageError, match="auto, bucketed, continuous"):
        tw.load(path, batching="dynamic")


def test_memory_that_cannot_be_had_is_one_clear_error(engine) -> None:
    kind = PagedExecutor if engine.config.kv_cache == "paged" else SlotExecutor
    executor = kind(engine.runner) if kind is PagedExecutor else kind(engine.runner, 4)
    with pytest.raises(CapacityError, match="KV cache.*max_batch_size"):
        executor.allocate(2**40, 2**12)


def test_kv_bytes_of_a_token(engine) -> None:
    layers, width = 2, 64
    assert engine.executor.bytes_per_token == 2 * layers * width * 4

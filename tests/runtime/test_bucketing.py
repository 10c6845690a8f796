"""Prompts of about one length in one step: who goes together, what is padded, what it costs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_executor import VOCAB, FakeExecutor, greedy
from tilewright.errors import UnsupportedError, UsageError
from tilewright.runtime import (
    Capabilities,
    GenerationLoop,
    Sampler,
    SamplingParams,
    Scheduler,
    SlotPool,
    Step,
)
from tilewright.runtime.bucketing import LengthBuckets, Padding, check_batching, length_buckets
from tilewright.runtime.image import LMConfig
from tilewright.runtime.metrics import Metrics
from tilewright.runtime.prometheus import exposition
from tilewright.runtime.request import Request
from tilewright.runtime.slot_batch import slot_batches

MAX_LEN = 48


def slots(count: int) -> Capabilities:
    return Capabilities(mixes=False, pages=False, shares=False, max_slots=count, prefills=count)


def slot_loop(count: int = 4, longest: int = MAX_LEN, **knobs: object) -> GenerationLoop:
    executor, pool = FakeExecutor(slots(count)), SlotPool(count, MAX_LEN)
    knobs = {"buckets": LengthBuckets.up_to(longest), **knobs}
    scheduler = Scheduler(pool, executor.capabilities, **knobs)
    return GenerationLoop(executor, pool, scheduler, Sampler(), None, [], MAX_LEN, VOCAB)


def waiting(*lengths: int, **params: object) -> list:
    requests = [
        Request([1] * length, SamplingParams(**params), frozenset(), 9, None) for length in lengths
    ]
    return [request.sequences[0] for request in requests]


@given(st.integers(1, 400), st.floats(1, 3), st.integers(1, 40))
def test_each_length_has_one_bucket_and_a_bucket_holds_lengths_that_are_close(
    longest: int, growth: float, width: int
) -> None:
    buckets = LengthBuckets.up_to(longest, growth, width)
    found: dict[int, list[int]] = {}
    for length in range(1, longest + 1):
        found.setdefault(buckets.of(length), []).append(length)
    assert sorted(found) == list(range(len(buckets.bounds)))
    for index, members in found.items():
        assert members[-1] == buckets.bounds[index]
        assert members == list(range(members[0], members[-1] + 1))
        assert len(members) <= width and members[-1] <= max(members[0], growth * members[0])
    assert buckets.of(longest + 1) == len(buckets.bounds)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 6), st.integers(1, 200)
)
def test_companions_are_of_the_firsts_bucket_and_within_the_budget(
    lengths: list[int], most: int, tokens: int
) -> None:
    buckets, queue = LengthBuckets.up_to(60), waiting(*lengths)
    found = buckets.companions(queue, most, tokens)
    group = [queue[0], *found]
    assert found == [seq for seq in queue[1:] if seq in found]  # by rank, each once
    assert {buckets.of(seq.remaining) for seq in group} == {buckets.of(lengths[0])}
    assert len(group) <= most or not found
    assert not found or len(group) * max(seq.remaining for seq in group) <= tokens
    alike = [n for n in lengths[1:] if buckets.of(n) == buckets.of(lengths[0])]
    if most * 60 <= tokens:
        assert len(found) == min(most - 1, len(alike))


def test_who_stays_alone() -> None:
    buckets = LengthBuckets((20,))
    first, other = waiting(8, 8)
    (scored,) = waiting(8, prompt_logprobs=0)
    (several,) = waiting(8, n=2)
    (later,) = waiting(8, priority=1)
    assert buckets.companions([first, scored, several, other], 9, 99) == [other]
    assert buckets.companions([scored, other], 9, 99) == []
    assert buckets.companions([several, other], 9, 99) == []
    assert buckets.companions([first, other, later], 9, 99) == [other]
    assert buckets.companions([first, other], 1, 99) == []


@pytest.mark.quick
@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_prompt_is_computed_once_and_gives_its_own_tokens(
    requests: list[tuple[int, int]], count: int, one_bucket: bool
) -> None:
    loop = slot_loop(count, 1 if one_bucket else MAX_LEN)
    prompts = [[(7 * i + n) % VOCAB for i in range(n)] for n, _ in requests]
    params = [SamplingParams(max_new_tokens=new) for _, new in requests]
    found = [one.token_ids for (one,) in loop.generate(prompts, params)]
    assert found == [greedy(p, new) for p, (_, new) in zip(prompts, requests, strict=True)]
    counters = loop.counters
    assert counters.prefill_tokens == sum(n for n, _ in requests)
    assert counters.tokens_computed == sum(n + new - 1 for n, new in requests)
    assert counters.recomputed_tokens == 0 and loop.pool.num_free == count
    assert loop.executor.most_sequences <= count


def test_the_first_in_line_goes_first_and_companions_pass_the_others() -> None:
    loop = slot_loop(3)
    arrived = [loop.submit([1] * n, SamplingParams(max_new_tokens=9)) for n in (20, 5, 21, 6, 19)]
    loop.step()
    running = [seq.request for seq in loop.scheduler.running]
    assert running == [arrived[0], arrived[2], arrived[4]]
    for one in arrived:
        loop.cancel(one)
    assert loop.pool.num_free == 3


def test_continuous_computes_each_prompt_alone() -> None:
    loop = slot_loop(3, buckets=None)
    loop.generate([[1] * 5] * 3, SamplingParams(max_new_tokens=1))
    assert loop.counters.steps == 3 and loop.executor.most_sequences == 1
    loop = slot_loop(3)
    loop.generate([[1] * 5] * 3, SamplingParams(max_new_tokens=1))
    assert loop.counters.steps == 1 and loop.executor.most_sequences == 3


def test_the_rows_of_a_batch() -> None:
    """Slots 4, 1, 2: two runs of neighbours, each as long as its longest prompt."""
    step = Step(
        token_ids=torch.tensor([10, 11, 20, 21, 22, 30]),
        positions=torch.tensor([0, 1, 0, 1, 2, 0]),
        query_start=torch.tensor([0, 2, 5, 6], dtype=torch.int32),
        seq_lens=torch.tensor([2, 3, 1], dtype=torch.int32),
        slot_mapping=torch.arange(6),
        block_tables=torch.tensor([[4], [1], [2]], dtype=torch.int32),
        logits_indices=torch.tensor([1, 4, 5]),
    )
    both, alone = slot_batches(step, [4, 1, 2])
    assert (both.first, both.stop, both.padding) == (1, 3, 2)
    found = {name: value.tolist() for name, value in both.inputs.items()}
    assert found == {
        "token_ids": [20, 21, 22, 30, 0, 0],
        "positions": [0, 1, 2, 0, 1, 2],
        "seq_lens": [3, 3],
        "logits_indices": [2, 3],
    }
    assert both.rows.tolist() == [1, 2]
    assert (alone.first, alone.stop, alone.padding) == (4, 5, 0)
    assert alone.inputs["token_ids"].tolist() == [10, 11] and alone.rows.tolist() == [0]
    assert both.inputs["seq_lens"].dtype == torch.int32


def test_what_is_padded_is_told() -> None:
    loop = slot_loop()
    assert loop.counters.padding_share == 0
    metrics = Metrics(loop, "m")
    loop.generate([[1] * 6], SamplingParams(max_new_tokens=3))
    loop.executor.padding.prefill, loop.executor.padding.decode = 5, 3
    assert loop.counters.padding_tokens == 8
    assert loop.counters.padding_share == pytest.approx(8 / (8 + 8))
    text = exposition(metrics).decode()
    assert 'tilewright:padding_tokens_total{model_name="m",phase="prefill"} 5.0' in text
    assert 'tilewright:padding_tokens_total{model_name="m",phase="decode"} 3.0' in text
    assert Padding().share(0) == 0


@pytest.mark.parametrize("bounds", [(0, 4), (4, 4), (5, 3)])
def test_bounds_that_do_not_rise_are_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="rising"):
        LengthBuckets(bounds)


@pytest.mark.parametrize("wrong", [{"growth": 0.9}, {"growth": float("nan")}, {"width": 0}])
def test_buckets_of_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="1 or more"):
        LengthBuckets.up_to(9, **wrong)


def test_options() -> None:
    assert check_batching("bucketed", "slot") == "bucketed"
    assert check_batching("auto", "paged") == "auto"
    with pytest.raises(UsageError, match="auto, bucketed, continuous"):
        check_batching("dynamic", "slot")
    with pytest.raises(UnsupportedError, match="without padding"):
        check_batching("bucketed", "paged")
    config = LMConfig(9, 40, 2, 16, "slot", ())
    assert length_buckets(config) == LengthBuckets.up_to(40)
    assert length_buckets(LMConfig(9, 40, 2, 16, "slot", (), batching="continuous")) is None
    assert length_buckets(LMConfig(9, 40, 2, 16, "paged", ())) is None

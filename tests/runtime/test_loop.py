"""The loop against the same model without pages, batches or chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples_by_day import examples
from fake_executor import VOCAB, FakeExecutor, greedy, logits_of
from tilewright.errors import CapacityError, UnsupportedError, UsageError
from tilewright.runtime import (
    Capabilities,
    GenerationLoop,
    PagedPool,
    Sampler,
    SamplingParams,
    Scheduler,
    SlotPool,
)
from tilewright.runtime.sampling import SamplingState

MAX_LEN = 48


class Decoder:
    """Token t is the letter chr(97 + t)."""

    def push(self, token_id):
        return chr(97 + token_id)

    def finish(self):
        return ""


class Letters:
    def stream(self):
        return Decoder()


def paged_loop(num_pages=200, page_size=4, *, mixes=True, tokenizer=None, eos=(), **knobs):
    executor = FakeExecutor(Capabilities(mixes=mixes, pages=True, shares=True, max_slots=None))
    return _loop(executor, PagedPool(num_pages, page_size), tokenizer, eos, knobs)


def slot_loop(max_slots=3, tokenizer=None, eos=(), **knobs):
    executor = FakeExecutor(
        Capabilities(mixes=False, pages=False, shares=False, max_slots=max_slots)
    )
    return _loop(executor, SlotPool(max_slots, MAX_LEN), tokenizer, eos, knobs)


def _loop(executor, pool, tokenizer, eos, knobs):
    scheduler = Scheduler(pool, executor.capabilities, **knobs)
    return GenerationLoop(executor, pool, scheduler, Sampler(), tokenizer, eos, MAX_LEN, VOCAB)


def all_free(loop):
    pool = loop.pool
    full = pool.num_pages - (1 if pool.shares else 0)
    idle = not loop.scheduler.running and not loop.scheduler.waiting
    return idle and pool.num_free == full and pool.waste() == 0


def seeded(prompt, params, index):
    """The oracle of a sampled sequence: the sampler on the model without pages."""
    state, tokens = SamplingState(params, prompt, frozenset(), index), list(prompt)
    for _ in range(params.max_new_tokens):
        token = Sampler().sample(logits_of(tokens)[None], [state])[0].token_id
        state.commit(token)
        tokens.append(token)
    return tokens[len(prompt) :]


prompts_strategy = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=6
)


@st.composite
def workloads(draw):
    prompts = draw(prompts_strategy)
    params = [
        SamplingParams(
            max_new_tokens=draw(st.integers(1, 16)),
            n=draw(st.integers(1, 4)),
            temperature=draw(st.sampled_from([0.0, 1.3])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.5])),
            seed=draw(st.integers(0, 3)),
        )
        for _ in prompts
    ]
    return prompts, params


def check(loop, prompts, params):
    results = loop.generate(prompts, params)
    for prompt, one, completions in zip(prompts, params, results, strict=True):
        assert [c.token_ids for c in completions] == [seeded(prompt, one, i) for i in range(one.n)]
        assert {c.finish_reason for c in completions} == {"length"}
    assert all_free(loop)


@examples(30)
@given(
    workload=workloads(),
    page_size=st.integers(1, 9),
    extra=st.integers(0, 12),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 8),
    mixes=st.booleans(),
)
def test_paged_tokens_are_those_of_the_model_alone(
    workload, page_size, extra, budget, max_num_seqs, mixes
):
    longest = max(len(p) + one.max_new_tokens for p, one in zip(*workload, strict=True))
    num_pages = 1 + -(-longest // page_size) + extra  # often too few for two at once
    loop = paged_loop(
        num_pages, page_size, mixes=mixes, max_tokens_per_step=budget, max_num_seqs=max_num_seqs
    )
    check(loop, *workload)
    assert loop.executor.most_sequences <= max_num_seqs
    assert not mixes or loop.executor.most_tokens <= budget


@examples(20)
@given(workload=workloads(), max_slots=st.integers(1, 5))
def test_slot_tokens_are_those_of_the_model_alone(workload, max_slots):
    check(slot_loop(max_slots), *workload)


@pytest.mark.quick
@pytest.mark.parametrize("make", [paged_loop, slot_loop])
def test_greedy_tokens_in_one_call(make):
    loop = make()
    prompts = [[1, 2, 3], [4], list(range(20))]
    results = loop.generate(prompts, SamplingParams(max_new_tokens=12))
    assert [[c.token_ids for c in r] for r in results] == [[greedy(p, 12)] for p in prompts]
    usage = results[2][0].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (20, 12, 0)
    assert all_free(loop)


@pytest.mark.quick
@pytest.mark.parametrize("make", [paged_loop, slot_loop])
def test_no_past_token_is_computed_again(make):
    loop = make()
    prompts = [[1, 2, 3], [4], list(range(20))]
    loop.generate(prompts, SamplingParams(max_new_tokens=12))
    counters = loop.counters
    assert counters.prefill_tokens == 24
    assert counters.decode_tokens == 3 * 11
    assert counters.tokens_computed == 24 + 3 * 11
    assert counters.sampled_tokens == 36
    assert counters.recomputed_tokens == 0
    assert counters.prefill_seconds > 0 and counters.decode_seconds > 0


def test_samples_share_the_prompt_and_copy_one_page_when_they_write():
    loop = paged_loop(num_pages=100, page_size=4)
    params = SamplingParams(max_new_tokens=5, n=4, temperature=1.0, seed=1)
    prompt = list(range(18))  # the last of 5 pages is half full
    results = loop.generate([prompt], params)[0]
    assert loop.counters.prefill_tokens == 18
    assert loop.counters.copied_pages == 3  # the last writer keeps the page itself
    assert [c.usage.cached_tokens for c in results] == [0, 18, 18, 18]
    assert [c.token_ids for c in results] == [seeded(prompt, params, i) for i in range(4)]


def test_slots_are_copied_for_samples_and_computed_again_without_room():
    params = SamplingParams(max_new_tokens=5, n=3, temperature=1.0, seed=1)
    prompt = list(range(10))
    roomy, tight = slot_loop(3), slot_loop(1)
    assert roomy.generate([prompt], params) == roomy.generate([prompt], params)
    assert roomy.counters.recomputed_tokens == 0
    expected = [seeded(prompt, params, i) for i in range(3)]
    assert [c.token_ids for c in tight.generate([prompt], params)[0]] == expected
    assert tight.counters.recomputed_tokens == 20
    assert all_free(tight)


def test_preemption_leaves_the_result_unchanged():
    loop = paged_loop(num_pages=12, page_size=2)
    prompts = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    params = SamplingParams(max_new_tokens=14, temperature=0.8, seed=3)
    results = loop.generate(prompts, params)
    assert loop.scheduler.num_preemptions > 0
    assert loop.counters.recomputed_tokens > 0
    assert [r[0].token_ids for r in results] == [seeded(p, params, 0) for p in prompts]
    assert all_free(loop)


def test_a_long_prompt_is_computed_in_chunks_beside_decoding():
    loop = paged_loop(page_size=4, max_tokens_per_step=8)
    short = loop.stream([1, 2], SamplingParams(max_new_tokens=10))
    tokens = next(short).token_ids
    long = list(range(20)) * 2
    result = loop.generate([long], SamplingParams(max_new_tokens=2))[0][0]
    tokens += [token for delta in short for token in delta.token_ids]
    assert result.token_ids == greedy(long, 2)
    assert tokens == greedy([1, 2], 10)
    assert loop.executor.most_tokens == 8  # 7 of the prompt and 1 of the stream
    assert all_free(loop)


@pytest.mark.quick
@pytest.mark.parametrize("make", [paged_loop, slot_loop])
def test_stream_gives_the_tokens_and_text_of_generate(make):
    loop = make(tokenizer=Letters())
    params = SamplingParams(max_new_tokens=8, n=2, temperature=1.0, seed=5, logprobs=2)
    deltas = list(loop.stream([3, 4], params))
    for index, completion in enumerate(loop.generate([[3, 4]], params)[0]):
        own = [delta for delta in deltas if delta.index == index]
        assert [t for delta in own for t in delta.token_ids] == completion.token_ids
        assert "".join(delta.text for delta in own) == completion.text
        assert [p for delta in own for p in delta.logprobs] == completion.logprobs
        assert [delta.finish_reason for delta in own] == [None] * 7 + ["length"]
    assert all_free(loop)


def test_an_abandoned_stream_frees_its_pages():
    loop = paged_loop()
    stream = loop.stream([1, 2, 3], SamplingParams(max_new_tokens=20, n=2))
    next(stream)
    assert not all_free(loop)
    stream.close()
    assert all_free(loop)
    loop.stream([1, 2, 3])  # never started: nothing is queued
    assert all_free(loop)


@given(
    prompts=prompts_strategy,
    turns=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60),
    num_pages=st.integers(10, 40),
)
def test_interleaved_and_abandoned_streams(prompts, turns, num_pages):
    loop = paged_loop(num_pages, page_size=4, max_tokens_per_step=12)
    streams = [loop.stream(p, SamplingParams(max_new_tokens=9)) for p in prompts]
    tokens = [[] for _ in prompts]
    for turn, close in turns:
        index = turn % len(prompts)
        if close and len(turns) % 3 == 0:
            streams[index].close()
        tokens[index] += [
            t for delta in [next(streams[index], None)] if delta for t in delta.token_ids
        ]
    for stream in streams:
        stream.close()
    assert all(got == greedy(p, 9)[: len(got)] for got, p in zip(tokens, prompts, strict=True))
    assert all_free(loop)


@pytest.mark.parametrize("step", [1, 3, 7])
def test_an_interrupted_call_frees_its_pages_and_others_go_on(step):
    loop = paged_loop()
    stream = loop.stream([1, 2, 3], SamplingParams(max_new_tokens=12))
    tokens = list(next(stream).token_ids)
    loop.executor.fail_at = loop.executor.num_steps + step
    with pytest.raises(KeyboardInterrupt):
        loop.generate([[4, 5], [6]], SamplingParams(max_new_tokens=12))
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == greedy([1, 2, 3], 12)
    assert all_free(loop)


def test_end_of_sequence_stop_tokens_and_minimum():
    full = greedy([1, 2], 12)
    eos = full[4]
    first = full.index(eos)
    loop = paged_loop(eos=[eos], tokenizer=Letters())

    def run(**params):
        return loop.generate([[1, 2]], SamplingParams(max_new_tokens=12, **params))[0][0]

    stopped = run()
    assert stopped.token_ids == full[: first + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.text == "".join(chr(97 + t) for t in full[:first])
    assert run(ignore_eos=True).token_ids == full
    by_token = run(ignore_eos=True, stop_token_ids=[eos])
    assert by_token == stopped
    late = run(min_new_tokens=12)
    assert eos not in late.token_ids[:-1]
    assert len(late.token_ids) == 12
    text = "".join(chr(97 + t) for t in full)
    cut = run(ignore_eos=True, stop=text[6:8])
    assert cut.text == text[: text.index(text[6:8])]
    assert cut.finish_reason == "stop"


def test_the_context_ends_a_sequence():
    loop = paged_loop()
    result = loop.generate([[1] * 40], SamplingParams(max_new_tokens=100))[0][0]
    assert len(result.token_ids) == MAX_LEN - 40
    assert result.finish_reason == "length"
    assert result.token_ids == greedy([1] * 40, 8)
    small = paged_loop(num_pages=4, page_size=4)  # 12 places, and the last token needs none
    assert small.generate([[1] * 5])[0][0].token_ids == greedy([1] * 5, 8)


def test_timings_have_one_entry_a_token():
    timings = paged_loop().generate([[1, 2]], SamplingParams(max_new_tokens=5))[0][0].timings
    assert timings.ttft > 0
    assert len(timings.itl) == 4
    assert timings.tpot > 0


@pytest.mark.quick
@pytest.mark.parametrize(
    ("prompt", "error", "names"),
    [
        ([], UsageError, "at least one token"),
        ([1] * MAX_LEN, UsageError, "max_model_len"),
        ([VOCAB], UsageError, str(VOCAB)),
        ([-1], UsageError, "-1"),
        (["a"], UsageError, "token ids"),
        ("text", UsageError, "token ids"),
        ([1] * 30, CapacityError, "memory_fraction"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(prompt, error, names):
    loop = paged_loop(num_pages=5, page_size=4)
    for call in (lambda: loop.generate([[1, 2], prompt]), lambda: loop.stream(prompt)):
        with pytest.raises(error, match=names):
            call()
    assert loop.executor.num_steps == 0
    assert all_free(loop)


def test_bad_params_are_refused():
    loop = paged_loop()
    with pytest.raises(UsageError, match="one SamplingParams for each of the 2"):
        loop.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(UsageError, match="SamplingParams"):
        loop.generate([[1]], {"temperature": 1})
    with pytest.raises(UsageError, match="no tokenizer"):
        loop.generate([[1]], SamplingParams(stop="x"))
    with pytest.raises(UsageError, match="max_num_seqs"):
        paged_loop(max_num_seqs=0)


def test_tokens_that_the_model_lacks_or_that_leave_no_choice_are_refused():
    loop = paged_loop(eos=[5])
    for field, value in (("logit_bias", {VOCAB: 1.0}), ("allowed_token_ids", [1, VOCAB])):
        with pytest.raises(UsageError, match=f"{field}: expected token ids from 0 to {VOCAB - 1}"):
            loop.generate([[1], [2]], SamplingParams(**{field: value}))
    early = SamplingParams(allowed_token_ids=[5, 6], stop_token_ids=[6], min_new_tokens=1)
    with pytest.raises(UsageError, match="allowed_token_ids: expected a token that is no stop"):
        loop.generate([[1]], early)
    assert loop.executor.num_steps == 0
    assert all_free(loop)


@pytest.mark.parametrize("make", [paged_loop, slot_loop])
def test_only_allowed_tokens_come_and_only_from_who_asked(make):
    loop = make()
    asked = SamplingParams(max_new_tokens=9, allowed_token_ids=[3, 8], temperature=2.0, seed=1)
    chosen, free = loop.generate([[1, 2], [1, 2]], [asked, SamplingParams(max_new_tokens=9)])
    assert set(chosen[0].token_ids) == {3, 8}
    assert free[0].token_ids == greedy([1, 2], 9)


def test_a_pool_that_the_executor_cannot_serve_is_refused():
    slots = Capabilities(mixes=False, pages=False, shares=False, max_slots=2)
    pool = PagedPool(10, 4)
    with pytest.raises(UnsupportedError, match="SlotPool"):
        GenerationLoop(
            FakeExecutor(slots), pool, Scheduler(pool, slots), Sampler(), None, [], MAX_LEN
        )


def test_nothing_to_do():
    loop = paged_loop()
    assert loop.generate([]) == []
    loop.step()
    assert loop.counters.steps == 0


def test_a_deadline_ends_a_stream_with_what_there_is():
    loop = paged_loop(tokenizer=Letters())
    deltas = loop.stream([1, 2, 3], SamplingParams(max_new_tokens=20, deadline=1e6, stop=["zzz"]))
    first = next(deltas)
    loop.scheduler._timed[0].deadline = 0.0  # as if it had passed
    last = next(deltas)
    assert first.finish_reason is None and last.finish_reason == "deadline"
    assert last.token_ids == [] and next(deltas, None) is None
    assert first.text + last.text == chr(97 + first.token_ids[0])
    assert loop.pool.num_available == loop.pool.num_pages - 1


def test_a_deadline_of_nothing_gives_nothing():
    (ended,), (other,) = paged_loop().generate(
        [[1, 2], [3, 4]], [SamplingParams(deadline=0), SamplingParams(max_new_tokens=2)]
    )
    assert ended.token_ids == [] and ended.finish_reason == "deadline"
    assert other.token_ids == greedy([3, 4], 2)

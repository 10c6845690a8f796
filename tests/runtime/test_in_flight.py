"""Steps launched ahead: the same tokens as step by step, and books that are right whatever comes.

The device of `fake_decode` does nothing before it is waited for, so that whatever is overwritten
too early, or read too early, changes the tokens.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples_by_day import examples
from fake_decode import LazyExecutor, LazyQueue
from fake_executor import PAGED, VOCAB, FakeExecutor, greedy, logits_of
from tilewright.errors import KernelError, VerificationError
from tilewright.runtime import GenerationLoop, PagedPool, Sampler, SamplingParams, Scheduler
from tilewright.runtime.batch import DecodeBatch, DecodeBatches
from tilewright.runtime.beam_search import BeamSearcher
from tilewright.runtime.beams import BeamSearchParams
from tilewright.runtime.decode_buffer import DecodeBuffer, Turn
from tilewright.runtime.device_queue import ImmediateQueue
from tilewright.runtime.engine import score
from tilewright.runtime.plan import Chunk, Plan
from tilewright.runtime.request import Request
from tilewright.runtime.step_buffer import FIELDS, SAMPLING, StepShape

MAX_LEN = 48
LONG = SamplingParams(max_new_tokens=12)
BEAMS = BeamSearchParams(3, 6)


class Letters:
    """Token t is the letter chr(97 + t)."""

    def stream(self):
        return self

    def push(self, token_id):
        return chr(97 + token_id)

    def finish(self):
        return ""


def loop_of(executor, num_pages=200, page_size=4, eos=(), **knobs):
    pool = PagedPool(num_pages, page_size)
    knobs.setdefault("max_num_seqs", 8)
    scheduler = Scheduler(pool, executor.capabilities, **knobs)
    return GenerationLoop(
        executor, pool, scheduler, Sampler(), Letters(), eos, MAX_LEN, vocab_size=VOCAB
    )


def lazy(num_pages=200, page_size=4, eos=(), *, graphs_for=8, **knobs):
    return loop_of(LazyExecutor(graphs_for, MAX_LEN), num_pages, page_size, eos, **knobs)


def stepwise(eos=()):
    return loop_of(FakeExecutor(PAGED), eos=eos)


def queue_of(loop):
    return loop.executor.graphs.queue


def check_idle(loop):
    pool = loop.pool
    assert not loop.scheduler.running and not loop.scheduler.waiting
    assert loop._flight is None
    assert pool.num_free == pool.num_pages - 1 and pool.waste() == 0


def facts(results):
    return [
        [(c.token_ids, c.text, c.finish_reason, c.logprobs) for c in completions]
        for completions in results
    ]


TOKEN = st.integers(0, VOCAB - 1)
PROMPT = st.lists(TOKEN, min_size=1, max_size=14)
RARELY = st.sampled_from([False] * 5 + [True])


@st.composite
def params(draw):
    count = draw(st.integers(1, 16))
    rare = {
        "repetition_penalty": 1.5,
        "logprobs": 2,
        "min_new_tokens": count // 2,
        "ignore_eos": True,
    }
    return SamplingParams(
        max_new_tokens=count,
        n=draw(st.sampled_from([1, 1, 1, 3])),
        temperature=draw(st.sampled_from([0.0, 0.0, 1.25])),
        top_k=draw(st.sampled_from([0, 5])),
        top_p=draw(st.sampled_from([1.0, 0.75])),
        seed=draw(st.integers(0, 3)),
        stop=draw(st.lists(st.sampled_from(["a", "be", "qf", "n"]), max_size=2)),
        stop_token_ids=draw(st.lists(TOKEN, max_size=2)),
        **{name: value for name, value in rare.items() if draw(RARELY)},
    )


REQUESTS = st.lists(st.tuples(PROMPT, params()), min_size=1, max_size=7)


@examples(25)
@given(
    requests=REQUESTS,
    eos=st.lists(TOKEN, max_size=1),
    page_size=st.integers(1, 9),
    extra=st.integers(0, 20),
    budget=st.integers(4, 40),
    most=st.integers(1, 8),
    graphs_for=st.integers(1, 8),
)
def test_tokens_ahead_are_those_of_step_by_step(
    requests, eos, page_size, extra, budget, most, graphs_for
):
    prompts, each = [p for p, _ in requests], [q for _, q in requests]
    longest = max(len(p) + q.max_new_tokens for p, q in requests)
    pages = 1 + -(-longest // page_size) + extra  # often too few for two at once
    loop = lazy(
        pages,
        page_size,
        eos,
        graphs_for=graphs_for,
        max_tokens_per_step=budget,
        max_num_seqs=most,
    )
    assert facts(loop.generate(prompts, each)) == facts(stepwise(eos).generate(prompts, each))
    check_idle(loop)


@examples(20)
@given(
    requests=REQUESTS,
    turns=st.lists(st.tuples(st.integers(0, 9), RARELY), max_size=50),
    eos=st.lists(TOKEN, max_size=1),
    num_pages=st.integers(12, 40),
)
def test_streams_that_join_pause_and_are_closed(requests, turns, eos, num_pages):
    loop = lazy(num_pages, eos=eos, max_tokens_per_step=12)
    expected = stepwise(eos).generate([p for p, _ in requests], [q for _, q in requests])
    streams = [loop.stream(p, q) for p, q in requests]
    found: list[dict[int, list[int]]] = [{} for _ in requests]
    for turn, closes in turns:
        index = turn % len(requests)
        if closes:
            streams[index].close()
        elif (delta := next(streams[index], None)) is not None:
            found[index].setdefault(delta.index, []).extend(delta.token_ids)
    for stream in streams:
        stream.close()
    for completions, tokens in zip(expected, found, strict=True):
        for index, own in tokens.items():
            assert own == completions[index].token_ids[: len(own)]
    check_idle(loop)


@examples(25)
@given(
    requests=REQUESTS,
    at=st.integers(1, 90),
    late=st.booleans(),
    eos=st.lists(TOKEN, max_size=1),
)
def test_an_interrupt_anywhere_leaves_the_others_their_tokens(requests, at, late, eos):
    loop = lazy(eos=eos)
    kept = SamplingParams(max_new_tokens=20, temperature=1.25, seed=7, ignore_eos=True)
    (expected,) = stepwise(eos).generate([[1, 2, 3]], kept)[0]
    stream = loop.stream([1, 2, 3], kept)
    tokens = list(next(stream).token_ids)
    queue_of(loop).fail_at, queue_of(loop).fail_late = queue_of(loop).calls + at, late
    prompts, each = [p for p, _ in requests], [q for _, q in requests]
    try:
        results = loop.generate(prompts, each)
    except KeyboardInterrupt:
        results = loop.generate(prompts, each)
    queue_of(loop).fail_at = None
    assert facts(results) == facts(stepwise(eos).generate(prompts, each))
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == expected.token_ids
    check_idle(loop)


@pytest.mark.quick
def test_the_next_step_is_queued_before_the_device_has_done_one():
    loop = lazy()
    prompts = [[1, 2, 3], [4], [5, 6]]
    results = loop.generate(prompts, LONG)
    assert [r[0].token_ids for r in results] == [greedy(p, 12) for p in prompts]
    assert queue_of(loop).ahead == 11  # every decode step, the first behind the prompts
    assert loop.executor.general.runs == 1 and loop.executor.decoding.runs == 11
    counters = loop.counters
    assert (counters.steps, counters.tokens_computed, counters.discarded_tokens) == (12, 39, 0)
    assert counters.prefill_tokens == 6 and counters.sampled_tokens == 36
    check_idle(loop)


def test_prompts_that_come_later_are_queued_behind_what_runs():
    loop = lazy(max_tokens_per_step=6)
    drawn = SamplingParams(max_new_tokens=20, temperature=1.25, top_k=5, seed=4)
    prompts = [[1, 2, 3], [*range(14)], [4], [5, 6]]
    requests = [loop.submit(prompts[0], drawn)]
    for prompt in prompts[1:]:
        loop.step()
        loop.step()
        requests.append(loop.submit(prompt, drawn))
    plans = []
    plan_ahead = loop.scheduler.schedule_ahead
    loop.scheduler.schedule_ahead = lambda: plans.append(plan_ahead()) or plans[-1]
    while not all(request.finished for request in requests):
        loop.step()
    results = [request.completions() for request in requests]
    assert facts(results) == facts(stepwise().generate(prompts, drawn))
    assert sum(plan is None for plan in plans) == 1  # at the very end
    assert loop.executor.general.runs == 5  # 3; 14 beside one, in chunks of 5, 5 and 4 and 1; 2
    check_idle(loop)


def test_who_needs_the_host_to_sample_is_not_admitted_ahead():
    loop = lazy()
    first = loop.submit([1, 2, 3], LONG)
    loop.step()
    penalised = SamplingParams(max_new_tokens=4, repetition_penalty=1.5)
    others = [loop.submit([4], LONG), loop.submit([5], penalised)]
    while not all(request.finished for request in (first, *others)):
        loop.step()
    found = [request.completions() for request in (first, *others)]
    alone = [([1, 2, 3], LONG), ([4], LONG), ([5], penalised)]
    assert facts(found) == [facts(stepwise().generate([p], q))[0] for p, q in alone]
    check_idle(loop)


def test_a_row_of_before_a_preemption_is_void():
    loop = lazy()
    one, two = loop.submit([1, 2, 3], LONG), loop.submit([4, 5], LONG)
    loop.step()
    with loop.lock:
        loop.make_room(loop.pool.num_available + 1)  # the second, which then waits
    assert loop.scheduler.num_preemptions == 1
    while not (one.finished and two.finished):
        loop.step()
    assert [r.completions()[0].token_ids for r in (one, two)] == [
        greedy([1, 2, 3], 12),
        greedy([4, 5], 12),
    ]
    assert loop.counters.discarded_tokens == 1
    check_idle(loop)


@pytest.mark.quick
def test_a_sequence_that_ends_in_the_window_discards_one_token():
    full = greedy([1, 2], 12)
    other = greedy([7, 8, 9], 12)
    eos = next(token for token in full[2:] if token not in other and full.index(token) >= 2)
    loop = lazy(eos=[eos])
    one, two = (r[0] for r in loop.generate([[1, 2], [7, 8, 9]], LONG))
    assert one.token_ids == full[: full.index(eos) + 1] and one.finish_reason == "stop"
    assert two.token_ids == other
    counters = loop.counters
    assert counters.discarded_tokens == 1
    # p + c - 1 each: nothing that counts is computed twice
    assert counters.tokens_computed == 2 + len(one.token_ids) - 1 + 3 + 12 - 1
    check_idle(loop)
    alone = lazy(eos=[eos])
    assert alone.generate([[1, 2]], LONG)[0][0] == one
    assert alone.counters.discarded_tokens == 1
    check_idle(alone)


def test_what_is_constant_is_not_copied_again():
    loop = lazy(page_size=16)
    loop.generate([[1, 2]], SamplingParams(max_new_tokens=40))
    copies = queue_of(loop).copies[2::2]  # behind the prompt's; every other is of tokens
    with_tables, ahead = copies[0], copies[1]
    assert with_tables > ahead and set(copies) == {ahead, with_tables}
    assert copies.count(with_tables) == 3  # of the first step, and with pages 2 and 3


def test_pinned_memory_is_not_written_while_the_device_may_read_it(monkeypatch):
    monkeypatch.setattr("tilewright.runtime.decode_buffer._TURNS", 1)  # the next step's is this one
    loop = lazy()
    assert loop.generate([[1, 2, 3]], LONG)[0][0].token_ids == greedy([1, 2, 3], 12)
    monkeypatch.setattr(Turn, "wait", lambda self, queue: None)
    with pytest.raises(AssertionError, match="never written"):  # the guard is what holds it
        lazy().generate([[1, 2, 3]], LONG)


def batch_of(key, start, token, params=LONG, version=1):
    tables = np.full((1, 3), 2, dtype=np.int32)
    return DecodeBatch((key,), [token], None, [start], [start], [params], None, tables, version)


def test_memory_of_a_step_that_failed_half_way_is_waited_for():
    queue, shape = LazyQueue(), StepShape(1, 1, 3, 1)
    names = [name for name in (*FIELDS, *SAMPLING) if name not in ("query_start", "logits_indices")]
    buffer = DecodeBuffer(shape, names, torch.device("cpu"), queue)
    for token in (3, 4):  # each turn once
        queue.fail_at, queue.fail_late = queue.calls + 1, True
        with pytest.raises(KeyboardInterrupt):
            buffer.fill(batch_of(1, token, token), shape)
    queue.fail_at = None
    buffer.fill(batch_of(1, 5, 5), shape)
    assert buffer.views["token_ids"].tolist() == [4]  # both done before one is written again
    queue.flush()
    assert buffer.views["token_ids"].tolist() == [5] == buffer.views["positions"].tolist()


def test_parameters_that_float32_does_not_hold_are_brought_into_it():
    queue, shape = ImmediateQueue(), StepShape(1, 1, 3, 1)
    names = [name for name in (*FIELDS, *SAMPLING) if name not in ("query_start", "logits_indices")]
    buffer = DecodeBuffer(shape, names, torch.device("cpu"), queue)
    for key, temperature in enumerate((0.0, 1e-300, 1e300)):
        odd = SamplingParams(temperature=temperature, top_k=2**40, top_p=1e-60, min_p=1.0)
        buffer.fill(batch_of(key, 0, 0, odd), shape)
        found = buffer.views["temperature"].item()
        assert (found > 0) == (temperature > 0) and found < float("inf")
        assert buffer.views["top_k"].item() == 2**31 - 1


def test_others_parameters_are_not_kept():
    loop = lazy()
    each = [LONG, SamplingParams(max_new_tokens=12, temperature=1.25, top_k=4, seed=2), LONG]
    for one in each:  # one sequence at a time, in the same place
        assert facts(loop.generate([[1, 2]], one)) == facts(stepwise().generate([[1, 2]], one))


def test_short_pages_preempt_as_they_do_step_by_step():
    loop = lazy(num_pages=12, page_size=2)
    prompts = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    drawn = SamplingParams(max_new_tokens=14, temperature=0.75, seed=3)
    assert facts(loop.generate(prompts, drawn)) == facts(stepwise().generate(prompts, drawn))
    assert loop.scheduler.num_preemptions > 0 and queue_of(loop).ahead > 10
    check_idle(loop)


def test_a_place_that_comes_free_is_taken_as_soon_as_step_by_step():
    each = [SamplingParams(max_new_tokens=count) for count in (4, 12, 5, 6)]
    prompts = [[1, 2], [3], [4, 5], [6]]
    loop, plain = lazy(max_num_seqs=2), loop_of(FakeExecutor(PAGED), max_num_seqs=2)
    assert facts(loop.generate(prompts, each)) == facts(plain.generate(prompts, each))
    assert loop.counters.steps == plain.counters.steps


def test_tables_are_gathered_anew_when_a_page_was_copied():
    pool = PagedPool(9, 4)
    request = Request([1, 2, 3], LONG, frozenset(), 12, None)
    seq = request.sequences[0]
    pool.add(seq.id)
    pool.append(seq.id, 3)
    seq.num_computed = 2
    batches = DecodeBatches(pool)

    def version(*copies):
        plan = Plan([Chunk(seq, 2, [6])], list(copies))
        return batches.build(plan.gathered(), None).tables_version

    first = version()
    assert version() == first < version((1, 2))


@pytest.mark.parametrize("eos_first", [False, True])
@pytest.mark.parametrize("after", [1, 4, 5])
def test_a_row_of_nan_is_an_error_of_its_request_and_the_others_go_on(after, eos_first):
    bad, seeded = [9, 9], SamplingParams(max_new_tokens=14, temperature=1.25, seed=3)
    full = greedy(bad, 12)
    eos = [full[after - 1]] if eos_first else []
    loop = lazy(eos=eos)
    expected = stepwise(eos).generate([[1, 2, 3]], SamplingParams(**_without_eos(seeded)))[0][0]
    stream = loop.stream([1, 2, 3], SamplingParams(**_without_eos(seeded)))
    tokens = list(next(stream).token_ids)
    poison = bad + full[:after]
    for runner in (loop.executor.general, loop.executor.decoding):
        runner.broken = lambda seen: seen[:2] == bad and len(seen) >= len(poison)
    if eos_first and full.index(full[after - 1]) < after:
        # It ends before the logits are NaN, which only a void row then has.
        ended = loop.generate([bad], LONG)[0][0]
        assert ended.token_ids == full[: full.index(eos[0]) + 1]
    else:
        with pytest.raises(VerificationError, match="prompt 0 of 1 .* finite"):
            loop.generate([bad], LONG)
    assert loop.scheduler.num_preemptions == 0  # nobody starts anew
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == expected.token_ids
    check_idle(loop)


def _without_eos(params):
    return {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "seed": params.seed,
        "ignore_eos": True,
    }


def test_the_error_comes_with_the_step_whose_logits_are_broken():
    loop = lazy()
    full = greedy([9, 9], 12)
    loop.executor.decoding.broken = lambda seen: len(seen) == 2 + 5
    stream = loop.stream([9, 9], LONG)
    tokens = []
    with pytest.raises(VerificationError, match="behind 7 tokens"):
        for delta in stream:
            tokens += delta.token_ids
    assert tokens == full[:5]
    check_idle(loop)


def test_a_launch_that_was_given_up_is_the_error_of_all_that_it_spoilt():
    """Of each row of its step, and of the step that was queued behind it; not of later ones."""
    loop = lazy()
    given_up = KernelError("a launch", expected="an end", found="none", remedy="None.")
    errors = [given_up]
    loop.executor.recover = lambda: errors.pop() if errors else None
    loop.executor.decoding.broken = lambda seen: seen[0] == 9 and len(seen) >= 5
    bad = [loop.submit([9, 9], LONG), loop.submit([9, 8], LONG), loop.submit([9], LONG)]
    good = loop.submit([1, 2, 3], LONG)
    while not (good.finished and all(one.finished for one in bad)):
        loop.step()
    for one in bad:
        with pytest.raises(KernelError) as caught:
            one.completions()
        assert caught.value is given_up
    assert good.completions()[0].token_ids == greedy([1, 2, 3], 12) and not errors
    with pytest.raises(VerificationError, match="finite"):
        loop.generate([[9, 9]], LONG)
    check_idle(loop)


def test_rows_that_fill_a_bucket_are_told():
    loop = lazy()
    loop.generate([[1], [2, 3], [4]], LONG)  # three sequences in a bucket of four
    assert (loop.counters.padding.decode, loop.counters.padding.prefill) == (11, 0)
    assert loop.counters.padding_share == 11 / (4 + 3 * 11 + 11)


def test_beams_go_between_steps_that_are_launched_ahead():
    (expected,) = _beams(stepwise()).search([[4, 5]], BEAMS)
    loop = lazy()
    stream = loop.stream([1, 2, 3], LONG)
    tokens = [token for _ in range(3) for token in next(stream).token_ids]
    (found,) = _beams(loop).search([[4, 5]], BEAMS)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == greedy([1, 2, 3], 12) and loop.scheduler.num_preemptions == 0
    check_idle(loop)


def _beams(loop):
    return BeamSearcher(loop, (), None)


@pytest.mark.quick
def test_rows_that_need_the_host_make_steps_wait_and_keep_the_streams():
    drawn = SamplingParams(max_new_tokens=20, temperature=1.25, top_p=0.75, seed=5)
    expected = stepwise().generate([[1, 2, 3]], drawn)[0][0].token_ids
    loop = lazy()
    stream = loop.stream([1, 2, 3], drawn)
    tokens = [token for _ in range(4) for token in next(stream).token_ids]
    ahead = queue_of(loop).ahead
    penalised = SamplingParams(max_new_tokens=6, repetition_penalty=1.5)
    other = loop.generate([[4, 5]], penalised)
    assert facts(other) == facts(stepwise().generate([[4, 5]], penalised))
    assert queue_of(loop).ahead == ahead  # none while the penalised request ran
    tokens += [token for delta in stream for token in delta.token_ids]
    assert queue_of(loop).ahead > ahead
    assert tokens == expected
    check_idle(loop)


def test_other_work_on_the_device_takes_the_tokens_place_and_is_noticed():
    loop = lazy()
    stream = loop.stream([1, 2, 3], LONG)
    tokens = [token for _ in range(4) for token in next(stream).token_ids]
    for ids in ([4], [4, 5, 6]):  # one is a decode step to the executor
        with loop.lock:
            found = score(loop.executor, loop.pool, torch.tensor(ids))
        assert torch.equal(found[-1], logits_of(ids))
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == greedy([1, 2, 3], 12)
    check_idle(loop)


def test_a_request_that_can_start_is_not_kept_waiting():
    loop = lazy()
    stream = loop.stream([1, 2, 3], LONG)
    next(stream), next(stream)
    before = loop.counters.steps
    late = loop.stream([4], SamplingParams(max_new_tokens=1))
    assert next(late).token_ids == greedy([4], 1)
    assert loop.counters.steps <= before + 2  # the one in flight, and its own
    assert [t for d in stream for t in d.token_ids] == greedy([1, 2, 3], 12)[2:]


def test_a_closed_stream_leaves_nothing_in_flight():
    loop = lazy()
    stream = loop.stream([1, 2, 3], LONG)
    next(stream), next(stream)
    assert loop._flight is not None
    stream.close()
    check_idle(loop)
    assert loop.counters.discarded_tokens == 1


def test_threads_share_the_steps():
    loop = lazy()
    found: dict[int, list[int]] = {}

    def work(index):
        found[index] = loop.generate([[index, 2]], LONG)[0][0].token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: greedy([index, 2], 12) for index in range(6)}
    check_idle(loop)

"""``bench serve``: loads whose figures are worked out by hand, on a clock that needs no waiting."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_clock import timed_loop
from fake_executor import VOCAB, greedy
from tilewright.compiler.bench.load import LoadDriver
from tilewright.compiler.bench.phases import PhaseMeter
from tilewright.compiler.bench.serving import Distribution, parse_objectives, run_load
from tilewright.compiler.bench.workloads import (
    Shape,
    Turn,
    arrival_times,
    num_requests,
    random_conversations,
    read_conversations,
)
from tilewright.errors import UsageError


def single(prompt, tokens):
    return (Turn([*prompt], tokens),)


def rng(seed=0):
    return np.random.default_rng(seed)


# Figures


@pytest.mark.quick
def test_figures_of_a_load_worked_out_by_hand():
    loop = timed_loop()
    loop.clock.now = 100.0
    talks = [single([1, 2], 3), single([3, 4, 5], 2), single([6], 2), single([7], 1)]
    found = run_load(
        loop,
        talks,
        [0.5, 1.0, 1.25, 10.0],
        {"ttft": 1.6, "tpot": 1.2, "e2el": 2.6},
        wait=loop.clock.wait,
    )
    # Steps begin at 100.5 (the first), 101.5 (all three), 102.5 (their next tokens), and 110.
    assert (found.completed, found.failed) == (4, 0) and found.seconds == pytest.approx(11.0)
    assert (found.input_tokens, found.output_tokens) == (7, 8)
    assert found.request_throughput == pytest.approx(4 / 11)
    assert found.output_throughput == pytest.approx(8 / 11)
    assert found.total_throughput == pytest.approx(15 / 11)
    ttft, e2el, queue = [1, 1.5, 1.25, 1], [3, 2.5, 2.25, 1], [0, 0.5, 0.25, 0]
    for mine, values in ((found.ttft, ttft), (found.e2el, e2el), (found.queue, queue)):
        assert mine.mean == pytest.approx(sum(values) / 4)
        assert mine.median == pytest.approx(sum(sorted(values)[1:3]) / 2)
    # Of 4 values the 90th percentile is 0.7 of the way from the third to the fourth.
    assert found.ttft.p90 == pytest.approx(1.25 + 0.7 * 0.25)
    assert found.ttft.p99 == pytest.approx(1.25 + 0.97 * 0.25)
    assert found.itl.mean == found.tpot.mean == found.tpot.p99 == 1
    assert found.good == 3 and found.goodput == pytest.approx(3 / 11)  # the first ends late
    assert found.most_at_once == 3 and found.preemptions == 0
    prefill, decode = found.phases["prefill"], found.phases["decode"]
    assert (prefill.steps, prefill.tokens, prefill.seconds) == (3, 2 + 5 + 1, 3.0)
    assert (decode.steps, decode.tokens, decode.seconds) == (1, 3, 1.0)
    assert (prefill.context, decode.context) == (2 + (3 + 3 + 1) + 1, 4 + 4 + 2)
    assert decode.tokens_per_second == 3.0 and decode.sequences == 3


@pytest.mark.quick
def test_a_request_that_comes_within_a_step_counts_from_when_it_came():
    loop = timed_loop(lambda tokens: 5.0)
    found = run_load(loop, [single([1], 1), single([2], 1)], [0.0, 1.0], wait=loop.clock.wait)
    assert found.queue.mean == 2.0 and found.ttft.mean == (5 + 9) / 2 and found.seconds == 10.0


@pytest.mark.quick
def test_a_client_of_limited_concurrency_holds_requests_back():
    loop = timed_loop()
    talks = [single([i], 2) for i in range(5)]
    found = run_load(loop, talks, [0.0] * 5, concurrency=2, wait=loop.clock.wait)
    # Two at a time, two seconds each: they are sent at 0, 0, 2, 2 and 4, and wait for nobody.
    assert found.most_at_once == 2 and found.seconds == 6.0
    assert found.queue.p99 == 0 and found.e2el.mean == found.e2el.p99 == 2.0
    assert found.e2el.std == 0
    free = run_load(timed_loop(), talks, [0.0] * 5)
    assert free.most_at_once == 5 and free.seconds == 2.0


@pytest.mark.quick
def test_turns_follow_answers():
    loop = timed_loop(caching=True)
    talk = (Turn([1, 2], 3), Turn([4], 2), Turn([5], 1))
    seen = []

    class Prompts(PhaseMeter):
        def added(self, request):
            seen.append((request.submitted, request.prompt))

    loop.observers.append(Prompts())
    driver = LoadDriver(loop, think=2.0, wait=loop.clock.wait)
    load = driver.run([talk], [1.0])
    first = [1, 2, *greedy([1, 2], 3), 4]
    second = [*first, *greedy(first, 2), 5]
    assert seen == [(1.0, [1, 2]), (6.0, first), (10.0, second)]  # 3 and 2 s for the answers
    assert [one.usage.cached_tokens for one in load.done] == [0, 4, 4]
    assert load.seconds == 11.0 and load.most_at_once == 1


@pytest.mark.quick
def test_what_cannot_be_taken_fails_alone():
    loop = timed_loop()
    talks = [single([1] * 60, 2), (Turn([2], 40), Turn([3], 20), Turn([4], 1)), single([5], 2)]
    found = run_load(loop, talks, [0.0] * 3, concurrency=1, wait=loop.clock.wait)
    assert (found.completed, found.failed) == (3, 2)  # 1 + 40 + 1 + 6 tokens, and no more fit
    assert len(found.errors) == 2 and all("max_model_len" in text for text in found.errors)
    assert found.output_tokens == 40 + 6 + 2


@pytest.mark.quick
def test_a_load_in_which_all_fails_has_no_rates():
    found = run_load(timed_loop(), [single([1] * 60, 2)], [0.0])
    assert (found.completed, found.failed, found.output_throughput) == (0, 1, 0)
    assert found.ttft == Distribution() and found.prefix_hit_rate is None


def test_an_interrupt_leaves_nothing_running():
    loop = timed_loop(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        run_load(loop, [single([1], 9), single([2, 3], 9)], [0.0, 0.0])
    assert not loop.scheduler.running and not loop.scheduler.waiting and not loop.observers
    assert loop.pool.num_free == loop.pool.num_pages - 1


def test_hits_and_preemptions_are_those_of_the_load():
    loop = timed_loop(caching=True)
    talks = [single([9] * 8 + [i], 2) for i in range(4)]
    for hits in (0, 32):  # the second time each finds its two pages
        found = run_load(loop, talks, [0.0] * 4)
        assert (found.prefix_queries, found.prefix_hits) == (36, hits)
    assert found.prefix_hit_rate == pytest.approx(32 / 36)
    tight = timed_loop(num_pages=4, page_size=2)
    assert run_load(tight, [single([1, 2], 3), single([3, 4], 3)], [0.0] * 2).preemptions == 1


@settings(max_examples=20)
@given(
    talks=st.lists(
        st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=3),
        min_size=1,
        max_size=6,
    ),
    gaps=st.lists(st.floats(0, 5), min_size=6, max_size=6),
    concurrency=st.none() | st.integers(1, 4),
    budget=st.integers(4, 12),
)
def test_every_request_is_served_in_its_time(talks, gaps, concurrency, budget):
    loop = timed_loop(lambda tokens: 0.1 + 0.01 * tokens, max_tokens_per_step=budget)
    conversations = [
        tuple(Turn([i % VOCAB] * length, tokens) for length, tokens in turns)
        for i, turns in enumerate(talks)
    ]
    arrivals = np.cumsum(gaps[: len(talks)]).tolist()
    driver = LoadDriver(loop, concurrency=concurrency, think=0.5, wait=loop.clock.wait)
    load = driver.run(conversations, arrivals)
    assert len(load.done) == num_requests(conversations) and not load.failed
    assert concurrency is None or load.most_at_once <= concurrency
    sent = sorted(one.timings.submitted for one in load.done)
    assert sent[0] == pytest.approx(arrivals[0])
    assert load.seconds == pytest.approx(loop.clock.now, abs=0.2)


# Workloads


@pytest.mark.quick
def test_lengths_and_prefixes_are_as_asked_for():
    shape = Shape(40, 10, spread=0.5, shared=0.75, prefixes=3)
    talks = random_conversations(shape, 200, VOCAB, rng())
    assert num_requests(talks) == 200 and talks == random_conversations(shape, 200, VOCAB, rng())
    assert talks != random_conversations(shape, 200, VOCAB, rng(1))
    lengths = [len(turn.tokens) for (turn,) in talks]
    outputs = [turn.output_tokens for (turn,) in talks]
    assert min(lengths) == 31 and max(lengths) == 60  # never less than the prefix and a token
    assert (min(outputs), max(outputs)) == (5, 15) and 9 < sum(outputs) / 200 < 11
    assert len({tuple(turn.tokens[:30]) for (turn,) in talks}) == 3
    assert max(a + b for a, b in zip(lengths, outputs, strict=True)) <= shape.longest
    plain = random_conversations(Shape(8, 4), 20, VOCAB, rng())
    assert {(len(t.tokens), t.output_tokens) for (t,) in plain} == {(8, 4)}
    assert len({tuple(t.tokens) for (t,) in plain}) == 20


@pytest.mark.quick
def test_conversations_have_their_turns():
    talks = random_conversations(Shape(6, 2, turns=4), 10, VOCAB, rng())
    assert [len(turns) for turns in talks] == [4, 4, 2]


@pytest.mark.quick
def test_arrivals():
    assert arrival_times(3, math.inf, rng()) == [0.0] * 3
    assert arrival_times(4, 2.0, rng(), fixed=True) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    times = arrival_times(5000, 10.0, rng())
    assert times[-1] == pytest.approx(500.0) and times == sorted(times)
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as of an exponential


@pytest.mark.quick
def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "abc"}, {"prompt": [5, 6], "output_tokens": 3, "more": 1}, {"prompt": "d"}]
    path.write_text("\n\n".join(map(json.dumps, lines)))

    def encode(text: str) -> list[int]:
        return [ord(c) - 97 for c in text]

    assert read_conversations(path, 2, 7, encode) == [single([0, 1, 2], 7), single([5, 6], 3)]
    assert len(read_conversations(path, 9, 7, encode)) == 3


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("", "at least one prompt"),
        ('{"prompt": "a"}\nnonsense', "line 2"),
        ('{"prompt": []}', "line 1"),
        ('{"prompt": [1, "a"]}', "line 1"),
        ('{"prompt": "a", "output_tokens": 0}', "1 or more"),
        ('{"prompt": "a", "output_tokens": true}', "1 or more"),
        ('["a"]', "line 1"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, text, said):
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_conversations(path, 9, 7, list)


@pytest.mark.quick
def test_objectives():
    assert parse_objectives(()) == {}
    assert parse_objectives(["ttft:200 tpot:30"]) == {"ttft": 0.2, "tpot": 0.03}
    assert parse_objectives(["ttft:200,e2el:1e3", "tpot:5"])["e2el"] == 1.0
    for wrong in ("ttft", "ttft:", "itl:5", "tpot:-1", "tpot:0", "e2el:nan", "e2el:inf", ":3"):
        with pytest.raises(UsageError, match="ttft:200 tpot:30"):
            parse_objectives([wrong])

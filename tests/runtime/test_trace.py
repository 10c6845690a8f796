"""Traces: JSON whatever happens, spans that nest, and times that are those of Timings."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_clock import timed_loop
from fake_decode import LazyExecutor
from fake_executor import VOCAB
from tilewright.runtime import GenerationLoop, PagedPool, Sampler, SamplingParams, Scheduler
from tilewright.runtime.trace import ENGINE, REQUESTS, tracing

STEP = 1e6  # microseconds of a step of `timed_loop`


def read(path):
    """Events, by (process, thread), in the order of the file; names of threads aside."""
    tracks = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] != "M":
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    return tracks


def spans(events):
    return [(e["name"], e["ts"] / STEP, e["dur"] / STEP) for e in events if e["ph"] == "X"]


def check_requests(tracks):
    """Each request begins and ends once, and its spans follow each other in between."""
    for (process, _), events in tracks.items():
        if process != REQUESTS:
            continue
        first, *inside, instant, last = events
        assert (first["ph"], instant["ph"], last["ph"]) == ("B", "i", "E")
        assert first["ts"] <= last["ts"] == instant["ts"]
        now = first["ts"]
        for event in inside:
            assert event["ph"] == "X" and event["ts"] >= now - 1e-3 and event["dur"] > 0
            now = event["ts"] + event["dur"]
        assert now <= last["ts"] + 1e-3


def check_steps(tracks):
    steps = [e for e in tracks.get((ENGINE, 1), []) if e["ph"] == "X"]
    for before, after in zip(steps, steps[1:], strict=False):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
    return steps


@pytest.mark.quick
def test_two_requests_that_share_steps(tmp_path):
    loop = timed_loop(max_tokens_per_step=4)
    with tracing(loop, tmp_path / "trace.json"):
        assert not (tmp_path / "trace.json").exists()
        loop.generate([[1, 2, 3, 4, 5, 6], [7, 8, 9]], SamplingParams(max_new_tokens=3))
    tracks = read(tmp_path / "trace.json")
    check_requests(tracks)
    assert spans(tracks[REQUESTS, 1]) == [("prefill", 0, 1), ("prefill", 1, 1), ("decode", 2, 2)]
    queued = [("queued", 0, 1), ("prefill", 1, 1), ("prefill", 2, 1), ("decode", 3, 2)]
    assert spans(tracks[REQUESTS, 2]) == queued
    kinds = ["prefill", "prefill", "mixed", "decode", "decode"]
    assert spans(tracks[ENGINE, 1]) == [(kind, i, 1) for i, kind in enumerate(kinds)]
    args = [e["args"] for e in tracks[ENGINE, 1] if e["ph"] == "X"]
    assert args[2] == {"tokens": 2, "prefill_tokens": 1, "sequences": 2}
    counters = [e for e in tracks[ENGINE, 1] if e["ph"] == "C"]
    assert counters[0]["args"] == {"running": 1, "waiting": 1}
    assert counters[1]["args"] == {"free": 198} and counters[-1]["args"] == {"free": 199}
    end = tracks[REQUESTS, 1][-2]
    assert end["args"] == {
        "finish_reason": "length",
        "completion_tokens": 3,
        "cached_tokens": 0,
        "preemptions": 0,
    }
    assert loop.observers == []


@pytest.mark.quick
def test_a_preemption(tmp_path):
    loop = timed_loop(num_pages=4, page_size=2)  # see test_timings.py
    with tracing(loop, tmp_path / "trace.json"):
        loop.generate([[1, 2], [3, 4]], SamplingParams(max_new_tokens=3))
    tracks = read(tmp_path / "trace.json")
    check_requests(tracks)
    expected = [("prefill", 0, 1), ("preempted", 1, 2), ("prefill", 3, 1), ("decode", 4, 1)]
    assert spans(tracks[REQUESTS, 2]) == expected
    assert tracks[REQUESTS, 2][-2]["args"]["preemptions"] == 1


@pytest.mark.quick
def test_an_interrupt_leaves_a_whole_file(tmp_path):
    loop = timed_loop(fail_at=3)
    path = tmp_path / "trace.json"
    with pytest.raises(KeyboardInterrupt), tracing(loop, path):
        loop.generate([[1, 2], [3]], SamplingParams(max_new_tokens=9))
    tracks = read(path)
    check_requests(tracks)
    assert spans(tracks[REQUESTS, 1]) == [("prefill", 0, 1), ("decode", 1, 1)]
    assert tracks[REQUESTS, 1][-2]["args"]["finish_reason"] == "abort"
    assert [*tmp_path.iterdir()] == [path] and loop.observers == []


@pytest.mark.quick
def test_requests_that_reach_over_the_ends_of_a_trace(tmp_path):
    loop = timed_loop()
    early = loop.submit([1, 2], SamplingParams(max_new_tokens=3))
    loop.step()
    with tracing(loop, tmp_path / "trace.json"):
        late = loop.submit([1, 2], SamplingParams(max_new_tokens=9))
        while not early.finished:
            loop.step()
    tracks = read(tmp_path / "trace.json")
    check_requests(tracks)
    assert spans(tracks[REQUESTS, 1]) == [("decode", 0, 2)] and not late.finished
    assert spans(tracks[REQUESTS, 2]) == [("prefill", 0, 1), ("decode", 1, 1)]
    assert tracks[REQUESTS, 2][-2]["args"]["finish_reason"] == "unfinished"


@pytest.mark.quick
def test_a_place_that_cannot_be_written_is_said_before_anything_runs(tmp_path):
    loop = timed_loop()
    with pytest.raises(FileNotFoundError), tracing(loop, tmp_path / "none" / "trace.json"):
        pytest.fail("the block ran")
    assert loop.observers == []


@settings(max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=6),
    n=st.integers(1, 3),
    num_pages=st.integers(8, 20),
    budget=st.integers(3, 20),
    lazy=st.booleans(),
)
def test_times_are_those_of_timings(tmp_path_factory, lengths, n, num_pages, budget, lazy):
    if lazy:
        executor, pool = LazyExecutor(8, 48), PagedPool(num_pages, 4)
        knobs = {"max_num_seqs": min(8, budget), "max_tokens_per_step": budget}
        scheduler = Scheduler(pool, executor.capabilities, **knobs)
        loop = GenerationLoop(executor, pool, scheduler, Sampler(), None, [], 48)
    else:
        loop = timed_loop(num_pages=num_pages, max_tokens_per_step=budget, max_num_seqs=4)
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    prompts = [[i % VOCAB] * prompt for i, (prompt, _) in enumerate(lengths)]
    params = [SamplingParams(max_new_tokens=tokens, n=n, seed=1) for _, tokens in lengths]
    with tracing(loop, path):
        results = loop.generate(prompts, params)
    tracks = read(path)
    check_requests(tracks)
    steps = check_steps(tracks)
    assert len(steps) == loop.counters.steps
    assert sum(step["args"]["tokens"] for step in steps) == loop.counters.tokens_computed
    for thread, one in enumerate((c for completions in results for c in completions), start=1):
        events, times = tracks[REQUESTS, thread], one.timings

        def total(name, events=events):
            return sum(e["dur"] for e in events if e["name"] == name) / 1e6

        assert (events[-1]["ts"] - events[0]["ts"]) / 1e6 == pytest.approx(times.e2e, abs=1e-8)
        assert total("queued") == pytest.approx(times.queue, abs=1e-8)
        assert events[-2]["args"]["preemptions"] == times.preemptions
        if not times.preemptions and n == 1:
            assert total("decode") == pytest.approx(times.decode, abs=1e-8)
            ends = [e["ts"] + e["dur"] for e in events if e["name"] == "prefill"]
            first = (ends[-1] - events[0]["ts"]) / 1e6
            assert first == pytest.approx(times.ttft, abs=1e-8)

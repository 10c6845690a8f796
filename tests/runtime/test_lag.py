"""Steps that are noted together: whoever asks sees what each sequence would know if told."""

from __future__ import annotations

import threading
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_decode import LazyExecutor
from fake_executor import VOCAB, greedy
from tilewright.runtime import GenerationLoop, PagedPool, Sampler, SamplingParams, Scheduler
from tilewright.runtime import lag as module
from tilewright.runtime.decodes import Decodes
from tilewright.runtime.lag import Lag
from tilewright.runtime.metrics import Metrics
from tilewright.runtime.request import Request, Sequence, launch_each, note_each

MAX_LEN = 96
ASKED = ("tokens", "timings", "num_computed", "in_flight", "remaining", "num_tokens")


def sequences(lengths: list[int]) -> list[Sequence]:
    """Each with a prompt so long, a token behind it, and a step of that in flight."""
    each = []
    for length in lengths:
        request = Request([1] * length, SamplingParams(), frozenset(), 90, None, submitted=0.0)
        (seq,) = request.sequences
        seq.num_computed, seq.in_flight = length, 1
        note_each([seq], [7], 1.0)
        each.append(seq)
    launch_each(each)
    return each


def state(seq: Sequence):
    counts = seq.num_computed, seq.num_reached, seq.in_flight, seq.remaining
    return [*seq.tokens], [*seq.sampling.output], repr(seq.timings), counts


actions = st.lists(
    st.sampled_from(["launch", "note", "note", "ask", "interrupt"]), min_size=1, max_size=30
)


@pytest.mark.quick
@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), does=actions, data=st.data())
def test_whoever_asks_sees_all_that_has_come(lengths, does, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_KEPT", data.draw(st.sampled_from([2, 3, 256])))
        told, noted = sequences(lengths), sequences(lengths)
        lag, now = Lag(noted, 1.0), 1.0
        for what in does:
            seq = noted[data.draw(st.integers(0, len(noted) - 1))]
            if what == "launch":
                launch_each(told)
                lag.launch()
            elif what == "note":
                now += data.draw(st.floats(0.001, 2))
                tokens = data.draw(st.lists(st.integers(0, 9), min_size=len(told), max_size=99))
                note_each(told, tokens := tokens[: len(told)], now)
                lag.note(np.array(tokens), now)
            elif what == "ask":
                getattr(seq, data.draw(st.sampled_from(ASKED)))
                assert [*map(state, noted)] == [*map(state, told)]
            else:
                interrupt(patch, seq, data)
        lag.end()
        assert not lag.live and all(seq.lag is None for seq in noted)
        assert [*map(state, noted)] == [*map(state, told)]


def interrupt(patch, asked, data):
    """Somebody asks, and an interrupt comes before some sequence is told, or behind that."""
    left, late = data.draw(st.integers(0, 2)), data.draw(st.booleans())
    real, calls = Sequence.catch_up, []

    def catch_up(seq, *args):
        calls.append(seq)
        if late:
            real(seq, *args)
        if len(calls) > left:
            raise KeyboardInterrupt
        if not late:
            real(seq, *args)

    patch.setattr(Sequence, "catch_up", catch_up)
    with suppress(KeyboardInterrupt):
        assert asked.tokens
    patch.setattr(Sequence, "catch_up", real)


@pytest.mark.parametrize("name", ["num_computed", "in_flight"])
def test_who_goes_another_way_ends_it(name):
    seqs = sequences([2, 3])
    lag = Lag(seqs, 1.0)
    lag.launch()
    lag.note(np.array([4, 5]), 2.0)
    setattr(seqs[0], name, 0)
    assert not lag.live and getattr(seqs[0], name) == 0
    assert [seq.tokens[-1] for seq in seqs] == [4, 5] and not any(seq.lag for seq in seqs)


def test_the_rows_of_one_that_is_told_at_once_do_not_lag():
    quiet, asked = sequences([1, 2]), sequences([3])
    asked[0].quiet = False
    assert Decodes(quiet).lags and not Decodes([*quiet, *asked]).lags


def loop_of(params):
    executor = LazyExecutor(8, MAX_LEN)
    scheduler = Scheduler(PagedPool(300, 4), executor.capabilities, max_num_seqs=8)
    pool = scheduler.pool
    loop = GenerationLoop(executor, pool, scheduler, Sampler(), None, (), MAX_LEN, VOCAB)
    metrics = Metrics(loop, "none")
    return loop, [loop.submit([n, n + 1], params) for n in range(4)], metrics


def test_a_steady_loop_tells_nobody_and_loses_nothing(monkeypatch):
    loop, requests, _ = loop_of(SamplingParams(max_new_tokens=60))
    for _ in range(6):
        loop.step()
    calls, settle = [], Lag.settle
    monkeypatch.setattr(Lag, "settle", lambda lag: calls.append(lag) or settle(lag))
    for _ in range(30):
        loop.step()
    assert not calls
    assert [len(one.sequences[0].tokens) for one in requests] == [38] * 4 and calls
    loop.cancel(requests[1])
    while not all(request.finished or request.abandoned for request in requests):
        loop.step()
    for n in (0, 2, 3):
        (done,) = requests[n].completions()
        assert done.token_ids == greedy([n, n + 1], 60) and len(done.timings.itl) == 59


def test_others_threads_may_ask_at_any_time():
    loop, requests, metrics = loop_of(SamplingParams(max_new_tokens=80))
    over, wrong = threading.Event(), []

    def ask():
        while not over.is_set():
            metrics.refresh()
            for request in requests:
                seq = request.sequences[0]
                tokens = [*seq.tokens]
                if tokens[2:] != greedy(tokens[:2], len(tokens) - 2):
                    wrong.append(tokens)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        while not all(request.finished for request in requests):
            loop.step()
    finally:
        over.set()
        thread.join()
    metrics.refresh()
    assert not wrong and metrics.histograms["inter_token_latency_seconds"].counts.sum() == 4 * 79

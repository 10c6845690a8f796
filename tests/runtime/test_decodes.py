"""Decode steps over all rows at once: each as if it were alone, and when the rows are others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_decode import LazyExecutor
from fake_executor import PAGED, VOCAB, FakeExecutor
from tilewright.runtime import GenerationLoop, PagedPool, Sampler, SamplingParams, Scheduler
from tilewright.runtime.decodes import Decodes
from tilewright.runtime.request import Request, Sequence, note_each

MAX_LEN = 48
LONG = SamplingParams(max_new_tokens=30)
TOKEN = st.integers(0, VOCAB - 1)


class Syllables:
    """Token t is a letter, every fourth none, and every fifth waits for the next one's."""

    def __init__(self):
        self.kept = ""

    def stream(self):
        return Syllables()

    def push(self, token_id):
        text = self.kept + (chr(97 + token_id) if token_id % 4 else "")
        self.kept, text = (text, "") if token_id % 5 == 0 else ("", text)
        return text

    def finish(self):
        return self.kept


@st.composite
def requests(draw):
    """A request of one sequence, made as often as it is called for."""
    count = draw(st.integers(1, 14))
    params = SamplingParams(
        max_new_tokens=count,
        min_new_tokens=draw(st.sampled_from([0, 0, count // 2])),
        stop=draw(st.lists(st.sampled_from(["b", "cd", "v"]), max_size=1)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
    )
    stop_ids = frozenset(draw(st.lists(TOKEN, max_size=2)))
    decoder = draw(st.sampled_from([Syllables, Syllables, None]))
    if decoder is None:
        params = SamplingParams(max_new_tokens=count)
    streams = draw(st.booleans())

    def make() -> Sequence:
        request = Request([1, 2], params, stop_ids, count, decoder, streams=streams, submitted=0.0)
        return request.sequences[0]

    return make


def state(seq: Sequence):
    deltas = [(d.text, d.token_ids, d.finish_reason) for d in seq.deltas]
    text = seq.completion().text if seq.finish_reason else None
    return seq.tokens, seq.finish_reason, deltas, text, seq.sampling.output, seq.timings


@pytest.mark.quick
@settings(max_examples=60)
@given(makes=st.lists(requests(), min_size=1, max_size=4), data=st.data())
def test_noted_and_told_is_taken(makes, data):
    """Any may be told of each token; who is quiet is told of the last, or when time is over."""
    alone, rows = [make() for make in makes], [make() for make in makes]
    for now in range(1, 15):
        going = [row for row, seq in enumerate(alone) if seq.finish_reason is None]
        tokens = [data.draw(TOKEN) for _ in going]
        for row, token in zip(going, tokens, strict=True):
            alone[row].take(token, float(now))
            rows[row].in_flight = 1
        note_each([rows[row] for row in going], tokens, float(now))
        for row in going:
            if not rows[row].quiet or alone[row].finish_reason or data.draw(st.booleans()):
                rows[row].tell()
            assert not rows[row].in_flight and rows[row].num_reached == len(rows[row].tokens) - 1
    for one, row in zip(alone, rows, strict=True):
        for seq in (one, row):
            if seq.finish_reason is None:
                seq.expire()
    assert [*map(state, alone)] == [*map(state, rows)]


@pytest.mark.quick
@given(makes=st.lists(requests(), min_size=1, max_size=4), steps=st.integers(1, 40))
def test_numbers_are_those_of_each_stream(makes, steps):
    seqs = [make() for make in makes]
    for seq in seqs:
        seq.num_computed, seq.in_flight = 2, 1
    decodes = Decodes(seqs)
    assert decodes.random == any(seq.sampling.params.temperature for seq in seqs)
    for step in range(steps):
        positions = decodes.step()
        assert positions.tolist() == [2 + step] * len(seqs)
        expected = [
            seq.sampling.uniform(1) if seq.sampling.params.temperature else 0.0 for seq in seqs
        ]
        found = decodes.uniform(positions)
        assert found is None if not decodes.random else found.tolist() == expected
        again = decodes.uniform(positions)  # a step that is discarded takes none
        assert found is None or np.array_equal(found, again)
        for seq in seqs:
            seq.sampling.commit(0)


def loop_of(executor, **knobs):
    scheduler = Scheduler(PagedPool(200, 4), executor.capabilities, max_num_seqs=8, **knobs)
    pool = scheduler.pool
    return GenerationLoop(executor, pool, scheduler, Sampler(), Syllables(), (), MAX_LEN, VOCAB)


def rows_of(loop):
    """The decodes of the step in flight."""
    return loop._flight.plan.decodes


def test_the_rows_are_the_same_until_somebody_joins_leaves_or_is_full():
    loop = loop_of(LazyExecutor(8, MAX_LEN))
    lengths = (30, 30, 12)
    first = [loop.submit([n], SamplingParams(max_new_tokens=m)) for n, m in enumerate(lengths)]
    found = []
    for step in range(24):
        if step == 5:
            first.append(loop.submit([7, 8], LONG))
        if step == 18:
            loop.cancel(first[0])
        loop.step()
        if loop._flight is not None and rows_of(loop) is not None:
            found.append(rows_of(loop))
    changes = [(len(one.ids), found.count(one)) for one in dict.fromkeys(found)]
    # Those of the first step that leaves the full one out are for that step alone.
    assert [count for count, _ in changes] == [3, 4, 3, 3, 2]
    assert sum(times for _, times in changes) == len(found) and len(found) > 20


def test_nobody_is_looked_at_while_the_same_sequences_go_on(monkeypatch):
    loop = loop_of(LazyExecutor(8, MAX_LEN))
    for n in range(4):
        loop.submit([n], LONG)
    for _ in range(4):
        loop.step()
    calls = []
    for name in ("_survey", "_admits", "_take"):
        monkeypatch.setattr(loop.scheduler, name, lambda *args, name=name: calls.append(name))
    for name in ("take", "tell"):
        monkeypatch.setattr(Sequence, name, lambda *args, name=name: calls.append(name))
    for _ in range(8):
        loop.step()
    assert not calls and all(len(seq.tokens) > 8 for seq in loop.scheduler.running)


def test_what_is_computed_is_shown_as_chunks_of_those_who_waited():
    class Watcher:
        def added(self, request):
            pass

        def stepped(self, chunks, started, ended):
            seen.append([(chunk.seq, chunk.start, len(chunk.slots)) for chunk in chunks])
            assert len(chunks) == len(seen[-1]) and not chunks or chunks[0] in chunks[:1]

    seen = []
    loop = loop_of(LazyExecutor(8, MAX_LEN))
    loop.observers.append(Watcher())
    requests = [loop.submit([1, 2, 3], LONG), loop.submit([4], LONG)]
    for step in range(6):
        if step == 4:
            loop.cancel(requests[1])
        loop.step()
    one, two = (request.sequences[0] for request in requests)
    assert seen[0] == [(one, 0, 3), (two, 0, 1)]
    assert seen[1:4] == [[(one, 3 + i, 1), (two, 1 + i, 1)] for i in range(3)]
    assert seen[4:] == [[(one, 6, 1)], [(one, 7, 1)]]  # of the row that is void nothing
    assert loop.counters.discarded_tokens == 1 and loop.counters.decode_tokens == 8


@pytest.mark.parametrize("at", [1, 4, 9])
@pytest.mark.parametrize("streams", [False, True])
def test_an_interrupt_before_somebody_is_told_loses_nothing(at, streams, monkeypatch):
    stopped = SamplingParams(max_new_tokens=9, stop=["b", "v", "t"])
    params = [LONG, stopped, SamplingParams(max_new_tokens=4), stopped]
    prompts = [[n, n + 1] for n in range(4)]
    expected = loop_of(FakeExecutor(PAGED)).generate(prompts, params)
    loop, calls, tell = loop_of(LazyExecutor(8, MAX_LEN)), [], Sequence.tell

    def interrupted(seq, *args):
        calls.append(seq)
        if loop._flight is not None and len(calls) == at + 4:
            raise KeyboardInterrupt
        tell(seq, *args)

    requests = [loop.prepare(p, q, streams=streams) for p, q in zip(prompts, params, strict=True)]
    monkeypatch.setattr(Sequence, "tell", interrupted)
    for request in requests:
        loop.add(request)
    interrupts = 0
    while not all(request.finished for request in requests):
        try:
            loop.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1
    for request, (completion,) in zip(requests, expected, strict=True):
        (found,) = request.completions()
        assert (found.token_ids, found.text) == (completion.token_ids, completion.text)
        deltas = request.take_deltas()
        assert not streams or "".join(delta.text for delta in deltas) == completion.text
        assert not streams or sum((d.token_ids for d in deltas), []) == completion.token_ids

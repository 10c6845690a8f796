"""Steps that are padded and replayed give every request its own tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewright as tw
from e2e.models import CONTEXT, GPT, VOCAB, greedy_without_cache, moved_off_init
from tilewright.codegen.program import FRESH
from tilewright.runtime import step_graphs
from tilewright.runtime.device_queue import ImmediateQueue
from tilewright.runtime.executor import PagedExecutor
from tilewright.runtime.loop import GenerationLoop
from tilewright.runtime.pool import PagedPool
from tilewright.runtime.sampling import Sampler
from tilewright.runtime.scheduler import Scheduler
from tilewright.runtime.step import Step
from tilewright.runtime.step_graphs import StepGraphs, _Captured

PAGE, PAGES = 4, 60
MOST = 6


class Recorded(StepGraphs):
    """As on a GPU, but that a graph runs the Program over the memory it was captured with."""

    def __init__(self, runner, caches):
        super().__init__(runner, caches, MOST, -(-CONTEXT // PAGE), 2048, ImmediateQueue())
        self.replays = 0

    def _capture(self, shape):
        inputs, steps = self._inputs(), self

        class Graph:
            def replay(self):
                steps.replays += 1
                logits.copy_(steps.runner.run(inputs, fresh=shape.fresh)["logits"])

        logits = torch.full((shape.rows, VOCAB), torch.nan)
        return _Captured(Graph(), logits)


class Executor(PagedExecutor):
    """Captures on the CPU."""

    def allocate(self, num_pages, page_size, host_pages=0):
        super().allocate(num_pages, page_size, host_pages)
        for tensor in self.caches.tensors.values():
            tensor[1:].fill_(torch.nan)  # page 0 takes what padding writes
        self.steps = Recorded(self.runner, self.caches.tensors)


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(1)
    return moved_off_init(GPT())


@pytest.fixture(scope="module")
def runner(gpt):
    example = (torch.zeros(1, 8, dtype=torch.int64),)
    return tw.compile(gpt, example, backend="eager", kv_cache="paged").runner


def loop_over(runner) -> GenerationLoop:
    executor, pool = Executor(runner), PagedPool(PAGES, PAGE)
    scheduler = Scheduler(pool, executor.capabilities, max_num_seqs=MOST, max_tokens_per_step=24)
    return GenerationLoop(executor, pool, scheduler, Sampler(), None, (), CONTEXT)


def prompt_of(length: int) -> list[int]:
    return [(7 * i + length) % VOCAB for i in range(length)]


REQUESTS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6)), min_size=1, max_size=6)


@settings(max_examples=8)
@given(requests=REQUESTS)
def test_the_tokens_are_those_of_each_request_alone(gpt, runner, requests) -> None:
    loop = loop_over(runner)
    prompts = [prompt_of(length) for length, _ in requests]
    params = [tw.SamplingParams(max_new_tokens=count) for _, count in requests]
    expected = [
        greedy_without_cache(gpt, p, n) for p, (_, n) in zip(prompts, requests, strict=True)
    ]
    for _ in range(3):  # run, captured, replayed
        found = [one[0].token_ids for one in loop.generate(prompts, params)]
        assert found == expected
    assert loop.executor.steps.replays > 0


def a_step(tokens: int, sequences: int = 1, rows: int = 1) -> Step:
    starts = [tokens - sequences + i for i in range(sequences)]
    pages = torch.arange(1, -(-tokens // PAGE) + 1, dtype=torch.int32)
    return Step(
        token_ids=torch.arange(tokens) % VOCAB,
        positions=torch.cat([torch.arange(starts[0] + 1), torch.zeros(sequences - 1).long()]),
        query_start=torch.tensor([0, *(s + 1 for s in starts)], dtype=torch.int32),
        seq_lens=torch.tensor([starts[0] + 1, *[1] * (sequences - 1)], dtype=torch.int32),
        slot_mapping=torch.arange(PAGE, PAGE + tokens),
        block_tables=pages.repeat(sequences, 1),
        logits_indices=torch.arange(rows),
    )


@pytest.fixture
def steps(runner):
    executor = Executor(runner)
    executor.allocate(PAGES, PAGE)
    return executor.steps


def test_a_shape_is_captured_when_it_comes_back(steps) -> None:
    for expected in (0, 1, 1):
        assert steps.run(a_step(5), fresh=True) is not None
        assert len(steps.captured) == expected
    steps.run(a_step(16), fresh=False)  # the same bucket
    assert [shape.tokens for shape in steps.captured] == [16] and steps.replays == 3


def test_buckets(steps) -> None:
    def padded(*sizes: int) -> tuple[int, int, int]:
        shape = steps._shape(a_step(*sizes), fresh=True)
        return shape.tokens, shape.sequences, shape.rows

    assert padded(1, 1, 0) == (16, 1, 0)
    assert padded(17, 2, 1) == (32, 4, 4)
    assert padded(64, 5, 5) == (64, 6, 6)
    assert padded(65) == (128, 1, 1)
    assert padded(2048) == (2048, 1, 1)


@pytest.mark.parametrize(
    "sizes", [(2049, 1, 1), (7, 7, 1), (20, 2, 3)], ids=["tokens", "sequences", "rows of a score"]
)
def test_what_is_too_large_runs_as_it_is(steps, sizes) -> None:
    assert steps.run(a_step(*sizes), fresh=False) is None
    assert not steps.captured


@pytest.fixture
def slow(steps) -> list[float]:
    """A clock, by which a capture takes a second."""
    now, plain = [0.0], steps._capture
    steps.clock, steps._started, steps._next = lambda: now[0], 0.0, 0.0

    def capture(shape):
        now[0] += 1.0
        return plain(shape)

    steps._capture = capture
    return now


def test_captures_keep_a_distance_where_others_wait_for_them(steps, slow) -> None:
    def run(*counts):
        for tokens in counts:
            steps.run(a_step(tokens, 2, 2), fresh=False)
        return [shape.tokens for shape in steps.captured]

    assert run(3, 3, 20, 20, 20) == [16]
    slow[0] = 100.9
    assert run(20) == [16]
    slow[0] = 101.0  # a hundredth of the time since the last
    assert run(20, 40, 40) == [16, 32]


def test_captures_for_one_sequence_take_a_share_of_the_time(steps, slow) -> None:
    for tokens in (3, 20, 40, 60):
        for _ in range(2):
            steps.run(a_step(tokens), fresh=False)
    assert [shape.tokens for shape in steps.captured] == [16, 32, 48]  # over two seconds


def test_the_graph_used_longest_ago_makes_room(steps, monkeypatch) -> None:
    monkeypatch.setattr(step_graphs, "_MOST", 2)
    for tokens in (3, 20, 3, 20, 3, 40, 40):  # 20 is the one used longest ago
        steps.run(a_step(tokens), fresh=False)
    assert [shape.tokens for shape in steps.captured] == [16, 48]
    replays = steps.replays
    assert steps.run(a_step(20), fresh=False) is not None  # captured anew
    assert steps.replays == replays + 1 and len(steps.captured) == 2


def test_a_new_prompt_has_a_graph_of_its_own_where_a_call_asks_for_it(steps, runner) -> None:
    assert not steps._shape(a_step(16), fresh=True).fresh
    first, *others = runner.program.calls
    tokens = next(s for s in runner.program.buffers["token_ids"].symbols if s)
    guarded = replace(first, guard=(_symbol(tokens) * FRESH - 16,))
    steps._guarded = (guarded, *others[:1])
    assert steps._shape(a_step(16), fresh=True).fresh
    assert not steps._shape(a_step(16), fresh=False).fresh


def _symbol(name: str):
    from tilewright.ir.dims import symbol

    return symbol(name)

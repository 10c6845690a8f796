"""A load on a GPU, where steps are launched ahead: times, traces and metrics agree."""

from __future__ import annotations

import json
import timeit

import numpy as np
import pytest

import tilewright as tw
from tilewright.compiler.bench.serving import measure_serving, warm_up
from tilewright.compiler.bench.workloads import Shape, random_conversations
from tilewright.runtime.prometheus import exposition
from tiny_models import tiny_model

pytestmark = pytest.mark.gpu
REQUESTS = 40


@pytest.fixture(scope="module")
def engine():
    return tw.compile(tiny_model("llama"), backend="triton", max_batch_size=16, max_model_len=128)


def test_a_load_its_trace_and_its_metrics_agree(engine, tmp_path):
    shape = Shape(input_tokens=24, output_tokens=12, spread=0.5)
    talks = random_conversations(
        shape, REQUESTS, engine.config.vocab_size, np.random.default_rng(0)
    )
    warm_up(engine, talks, 8)
    metrics, path = engine.metrics, tmp_path / "trace.json"
    with engine.trace(path):
        found = measure_serving(engine, talks, rate=2000.0)
    assert found.completed == REQUESTS and found.failed == 0
    assert found.output_tokens == sum(turn.output_tokens for (turn,) in talks)
    assert 0 < found.ttft.median <= found.e2el.p99 and found.phases["decode"].mbu > 0
    metrics.refresh()
    for name, times in (("time_to_first_token", found.ttft), ("e2e_request_latency", found.e2el)):
        histogram = metrics.histograms[f"{name}_seconds"]
        assert histogram.counts.sum() == REQUESTS
        assert histogram.sum == pytest.approx(REQUESTS * times.mean)
    between = metrics.histograms["inter_token_latency_seconds"]
    assert between.counts.sum() == found.output_tokens - REQUESTS
    assert f'finished_reason="length",model_name="{engine.image.name}"' in (
        exposition(metrics).decode()
    )
    events = json.loads(path.read_text())["traceEvents"]
    steps = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert {step["name"] for step in steps} >= {"prefill", "decode"}
    for before, after in zip(steps, steps[1:], strict=False):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
    tokens = sum(step["args"]["tokens"] for step in steps)
    assert tokens == found.input_tokens + found.output_tokens - REQUESTS


def test_a_warm_engine_captures_nothing_more_to_decode(engine) -> None:
    engine.warm_up()
    graphs = engine.executor.graphs
    captured = dict(graphs.captured)
    assert sorted(captured) == [1, 2, 4, 8, 16]
    prompts = [[1, 2, 3 + i] for i in range(11)]
    params = tw.SamplingParams(max_new_tokens=8, ignore_eos=True)
    each = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert [one.token_ids for one in engine.generate(prompts, params)] == each
    assert graphs.captured == captured


def test_metrics_cost_a_step_less_than_five_microseconds(engine):
    metrics = engine.metrics
    metrics.refresh()
    least = min(timeit.repeat(lambda: metrics.stepped((), 0.0, 0.0), number=50, repeat=4)) / 50
    assert least < 5e-6

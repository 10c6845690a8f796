"""Metrics against sums over the completions, and as Prometheus' own parser reads them."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from fake_clock import timed_loop
from fake_executor import VOCAB
from tilewright.runtime import SamplingParams
from tilewright.runtime.metrics import HISTOGRAMS, Histogram, Metrics
from tilewright.runtime.prometheus import Collector, exposition

# What vLLM's dashboards ask for, as its `/metrics` spells it.
VLLM = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "prompt_tokens_cached_total",
    "generation_tokens_total",
    "request_success_total",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_params_n_bucket",
    "request_params_max_tokens_bucket",
    "request_prefill_kv_computed_tokens_bucket",
    "iteration_tokens_total_bucket",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_inference_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
]


def scrape(metrics):
    """(name, labels) → value, by Prometheus' own parser; every sample names the model."""
    found = {}
    for family in text_string_to_metric_families(exposition(metrics).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny"
            name = sample.name.removeprefix("tilewright:")
            assert name != sample.name
            found[name, *labels.values()] = sample.value
    return found


def watched(**knobs):
    loop = timed_loop(**knobs)
    return loop, Metrics(loop, "tiny")


@pytest.mark.quick
def test_figures_of_two_requests_that_share_steps():
    loop, metrics = watched(max_tokens_per_step=4)
    loop.generate([[1, 2, 3, 4, 5, 6], [7, 8, 9]], SamplingParams(max_new_tokens=3))
    found = scrape(metrics)  # steps of a second, see test_timings.py
    sums = {
        "time_to_first_token_seconds": (2, 2 + 3),
        "inter_token_latency_seconds": (4, 4),
        "request_time_per_output_token_seconds": (2, 2),
        "e2e_request_latency_seconds": (2, 4 + 5),
        "request_queue_time_seconds": (2, 0 + 1),
        "request_prefill_time_seconds": (2, 2 + 2),
        "request_decode_time_seconds": (2, 2 + 2),
        "request_inference_time_seconds": (2, 4 + 4),
        "request_prompt_tokens": (2, 9),
        "request_prefill_kv_computed_tokens": (2, 9),
        "request_generation_tokens": (2, 6),
        "request_params_max_tokens": (2, 6),
        "request_params_n": (2, 2),
        "iteration_tokens_total": (5, 9 + 4),
    }
    assert sums.keys() == HISTOGRAMS.keys()
    for name, (count, total) in sums.items():
        assert (found[name + "_count",], found[name + "_sum",]) == (count, total), name
    assert found["time_to_first_token_seconds_bucket", "2.5"] == 1
    assert found["time_to_first_token_seconds_bucket", "5.0"] == 2
    assert found["request_success_total", "length"] == 2 and found["generation_tokens_total",] == 6
    assert found["computed_tokens_total", "prefill"] == 9
    assert found["step_seconds_total", "prefill"] == 3
    assert found["step_seconds_total", "decode"] == 2


@pytest.mark.quick
def test_names_are_those_of_vllm():
    _, metrics = watched()
    names = {name for name, *_ in scrape(metrics)}
    assert names >= {*VLLM}
    registry = CollectorRegistry(auto_describe=True)
    registry.register(Collector(metrics))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(Collector(metrics))


@pytest.mark.quick
def test_requests_count_while_they_run():
    loop, metrics = watched(num_pages=11, max_tokens_per_step=4, max_num_seqs=1)
    stream = loop.stream([1] * 6, SamplingParams(max_new_tokens=9))
    next(stream), next(stream)
    waiting = loop.submit([2], SamplingParams(max_new_tokens=2))
    found = scrape(metrics)
    assert (found["num_requests_running",], found["num_requests_waiting",]) == (1, 1)
    assert found["kv_cache_usage_perc",] == pytest.approx(2 / 10)
    assert found["time_to_first_token_seconds_count",] == 1 and found["prompt_tokens_total",] == 6
    assert found["inter_token_latency_seconds_count",] == 1
    assert found["e2e_request_latency_seconds_count",] == 0
    next(stream)
    assert scrape(metrics)["inter_token_latency_seconds_count",] == 2
    stream.close()
    loop.cancel(waiting)
    found = scrape(metrics)
    assert found["request_success_total", "abort"] == 2
    assert found["e2e_request_latency_seconds_count",] == 0  # as in vLLM
    assert found["kv_cache_usage_perc",] == found["num_requests_running",] == 0
    assert not metrics._watched


def test_hits_and_preemptions():
    loop, metrics = watched(caching=True)
    for _ in range(2):
        loop.generate([[1] * 9], SamplingParams(max_new_tokens=2))
    found = scrape(metrics)
    hits = found["prefix_cache_hits_total",]
    assert found["prefix_cache_queries_total",] == 18 and hits == 8
    assert found["prompt_tokens_cached_total",] == 8
    assert found["request_prefill_kv_computed_tokens_sum",] == 10
    loop, metrics = watched(num_pages=4, page_size=2)
    loop.generate([[1, 2], [3, 4]], SamplingParams(max_new_tokens=3))
    found = scrape(metrics)
    assert found["num_preemptions_total",] == 1 and found["recomputed_tokens_total",] == 2


@settings(max_examples=15)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=6),
    n=st.integers(1, 3),
    asks=st.sets(st.integers(0, 12)),
    budget=st.integers(3, 20),
)
def test_no_token_counts_twice_whenever_one_asks(lengths, n, asks, budget):
    loop, metrics = watched(num_pages=14, max_tokens_per_step=budget)
    requests = [
        loop.submit([i % VOCAB] * prompt, SamplingParams(max_new_tokens=tokens, n=n, seed=1))
        for i, (prompt, tokens) in enumerate(lengths)
    ]
    steps = 0
    while not all(request.finished for request in requests):
        if steps in asks:
            metrics.refresh()
        loop.step()
        steps += 1
    done = [one for request in requests for one in request.completions()]
    metrics.refresh()
    expected = {
        "time_to_first_token_seconds": [one.timings.ttft for one in done],
        "inter_token_latency_seconds": [itl for one in done for itl in one.timings.itl],
        "e2e_request_latency_seconds": [one.timings.e2e for one in done],
        "request_queue_time_seconds": [one.timings.queue for one in done],
        "request_generation_tokens": [len(one.token_ids) for one in done],
        "request_prompt_tokens": [one.usage.prompt_tokens for one in done],
    }
    for name, values in expected.items():
        histogram = metrics.histograms[name]
        assert histogram.counts.sum() == len(values) and histogram.sum == pytest.approx(sum(values))
    assert metrics.histograms["iteration_tokens_total"].counts.sum() == steps
    assert metrics.prompt_tokens_cached == sum(one.usage.cached_tokens for one in done)


@given(st.lists(st.floats(0, 20), max_size=40))
def test_buckets_end_at_their_bounds(values):
    histogram = Histogram((1, 2.5, 10))
    histogram.add(values)
    below = [sum(value <= bound for value in values) for bound in (1, 2.5, 10, np.inf)]
    assert np.cumsum(histogram.counts).tolist() == below


def test_steps_that_nobody_asks_after_are_counted_in_bounded_memory():
    loop, metrics = watched()
    for _ in range(70):
        loop.generate([[1, 2]], SamplingParams(max_new_tokens=8))
    assert len(metrics._steps) < 256 and len(metrics._new) < 256
    assert scrape(metrics)["iteration_tokens_total_count",] == 560


def test_scrapes_from_other_threads_lose_nothing():
    loop, metrics = watched()
    done = threading.Event()

    def ask():
        while not done.is_set():
            metrics.refresh()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            loop.generate([[1], [2, 3]], SamplingParams(max_new_tokens=5))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    found = scrape(metrics)
    assert found["request_success_total", "length"] == 40
    assert found["inter_token_latency_seconds_count",] == 40 * 4
    assert found["iteration_tokens_total_count",] == 100

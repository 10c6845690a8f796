"""The bench: contenders decode as Hugging Face does, traces add up, floors and bars hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import tilewright as tw
from tilewright.compiler.bench import entrants, trace
from tilewright.compiler.bench.contenders import Compiled, Eager, Run, parse_names
from tilewright.compiler.bench.entrants import Entrant, Series, enter
from tilewright.compiler.bench.floor import make_floor
from tilewright.compiler.bench.latency import (
    Latency,
    Rival,
    engine_dtype,
    measure_latency,
)
from tilewright.compiler.bench.machine import Machine
from tilewright.compiler.bench.reference import ReferenceModel
from tilewright.compiler.bench.statistics import Ratio
from tilewright.compiler.bench.trace import Event, summarize
from tilewright.compiler.cli.bench_options import random_seed
from tilewright.compiler.cli.bench_view import latency_data, print_latency, short_name
from tilewright.errors import CheckpointError, UsageError
from tiny_gguf import tiny_hf_model, write_tiny_gguf

PROMPT = list(range(3, 20))
MARK = "at::cuda::(anonymous namespace)::spin_kernel(long)"
LINEARS = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96) + 320 * 64  # weights of the tiny model


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture(scope="module")
def reference(gguf) -> ReferenceModel:
    return ReferenceModel(str(gguf))


@pytest.fixture(scope="module")
def engine(gguf) -> tw.CausalLMEngine:
    return tw.compile(gguf, backend="eager", verify="structure", max_model_len=64)


def machine(device: str = "NVIDIA H100 80GB HBM3", rate: float = 3e12) -> Machine:
    flops = None if device == "cpu" else 7e14
    return Machine("h100", device, 2, 1, 0.0, rate, rate, flops, None, {"torch": "2.11"})


# Contenders


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_contenders_decode_as_generate_does(reference, name):
    ids = torch.tensor([PROMPT])
    expected = reference.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[
        0, len(PROMPT) :
    ].tolist()
    forward = Compiled(reference, 29, lambda forward: forward) if name == "compiled" else None
    contender = forward or Eager(reference)
    contender.prepare([PROMPT[::-1]])  # leaves nothing in the cache
    for _ in range(2):
        run = contender.run(PROMPT, 12)
        assert run.token_ids == expected
        assert len(run.itl) == 11 and min(run.ttft, *run.itl) > 0


def test_only_decode_steps_are_compiled(reference):
    calls = []

    def compiler(forward):
        def step(**inputs):
            calls.append({name: inputs[name].shape for name in ("input_ids", "position_ids")})
            return forward(**inputs)

        return step

    contender = Compiled(reference, 32, compiler)
    contender.prepare([PROMPT])
    assert calls == [{"input_ids": (1, 1), "position_ids": (1, 1)}] * 4
    assert len(contender.first_steps) == 4 and contender.cache.layers[0].max_cache_len == 64


def test_the_static_cache_holds_the_first_steps_too(reference):
    contender = Compiled(reference, 64, lambda forward: forward)
    contender.prepare([[5] * 62])  # with 2 new tokens: 64; the first steps go to 66
    assert contender.cache.layers[0].max_cache_len == 128


def test_random_weights_need_a_configuration_only(tmp_path):
    tiny_hf_model().config.save_pretrained(tmp_path)
    made = ReferenceModel(str(tmp_path), dtype=torch.bfloat16, random_weights=3)
    assert made.has_random_weights and made.model.dtype is torch.bfloat16
    matrix = made.model.model.layers[0].mlp.down_proj.weight.detach().float()
    assert abs(float(matrix.std()) - made.model.config.initializer_range) < 0.002
    assert len(Eager(made).run(PROMPT, 3).token_ids) == 3
    with pytest.raises(CheckpointError, match="safetensors"):
        ReferenceModel(str(tmp_path))  # no checkpoint


@pytest.mark.quick
def test_names_of_contenders():
    assert parse_names("torch.compile, eager,eager") == ("torch.compile", "eager")
    assert parse_names("vllm,eager") == ("vllm", "eager")
    for wrong in ("llama", "eager,", ""):
        with pytest.raises(UsageError, match=r"torch\.compile, eager, vllm"):
            parse_names(wrong)


@pytest.mark.quick
def test_the_seed_of_random_weights_is_found_in_the_report():
    assert random_seed({"model": {"name": "m", "random_weights": 0}}) == 0
    assert random_seed({"model": {"name": "m"}}) is None


def test_a_contender_that_fails_is_reported_and_the_others_go_on(engine, reference, monkeypatch):
    def broken(name, model, length):
        if name == "torch.compile":
            raise RuntimeError("no compiler\nfound")
        return Eager(model)

    monkeypatch.setattr(entrants, "make_contender", broken)
    found = measure_latency(
        engine,
        lambda: reference,
        compare=("torch.compile", "eager"),
        prompt_tokens=8,
        new_tokens=4,
        repeat=2,
    )
    compiled, eager = found.rivals
    assert compiled.series is None and compiled.error == "RuntimeError: no compiler found"
    assert eager.agreeing_tokens == 4 == found.agreeing_tokens and len(eager.series.decode) == 2
    assert [bar.against for bar, _, _ in found.bars()] == ["eager", "eager"]


def test_a_model_that_does_not_fit_takes_all_contenders_out(engine):
    def load():
        raise torch.OutOfMemoryError("2 GiB wanted")

    found = measure_latency(engine, load, prompt_tokens=8, new_tokens=4, repeat=1)
    assert [rival.error for rival in found.rivals] == ["OutOfMemoryError: 2 GiB wanted"]
    assert found.ours.itl > 0 and found.bars() == [] and found.trace is None


@pytest.mark.quick
def test_only_rivals_may_fail_and_bad_input_is_raised(monkeypatch):
    def fail(prompt, new_tokens):
        raise RuntimeError("broken")

    rival = Entrant("eager", "eager", fail, runs=[Run([1], 1.0, [1.0])] * 2)
    rival.go([1], 2)
    rival.go([1], 2)
    assert rival.error == "RuntimeError: broken" and rival.series(1) is None
    with pytest.raises(RuntimeError, match="broken"):
        Entrant("tilewright", "tilewright", fail).go([1], 2)

    def misuse(name, model, length):
        raise UsageError("a", expected="b", found="c", remedy="d")

    monkeypatch.setattr(entrants, "make_contender", misuse)
    with pytest.raises(UsageError):
        enter("eager", None, [1], 2)


# Traces


def step(start: float, *kernels: tuple[str, float, float]) -> list[Event]:
    """Kernels at offsets from start, and a mark behind them; times in microseconds."""
    events = [Event(name, (start + at) * 1e-6, length * 1e-6) for name, at, length in kernels]
    return [*events, Event(MARK, events[-1].end + 2e-6, 1e-6)]


@pytest.mark.quick
def test_a_trace_of_steps():
    prompt = step(0, ("prefill", 0, 500))
    steps = [
        event
        for start in (1000, 1100, 1200)
        for event in step(
            start,
            ("Memcpy HtoD (Pinned -> Device)", -6, 2),
            ("void gemv<float>(int)", 0, 20),
            ("add_rms_norm_1f", 22, 4),
            ("void gemv<float>(int)", 24, 12),  # begins before the norm has ended
            ("Memset (Device)", 37, 1),
            ("add_rms_norm_1f", 40, 4),
            ("Memcpy DtoH (Device -> Pageable)", 46, 3),
        )
    ]
    known = {"add_rms_norm": (2, 1000), "norm": (2, 7), "gemv": (1, 9)}
    found = summarize([*reversed(steps), *prompt], 2, known)
    assert (found.steps, found.launches, found.memory_operations) == (3, 4, 3)
    assert found.launches_per_layer == 2
    micro = {n: round(getattr(found, n) * 1e6, 6) for n in ("span", "busy", "idle", "between")}
    assert micro == {"span": 44, "busy": 39, "idle": 5, "between": 56}
    gemv, norm = found.kernels
    assert (gemv.name, gemv.launches, gemv.bytes) == ("void gemv<float>(int)", 2, None)
    assert gemv.seconds == pytest.approx(32e-6)
    assert norm.bytes == 1000 and norm.bytes_per_second == pytest.approx(2000 / 8e-6)


def test_two_steps_between_marks_are_none():
    """The first call launches its own step and the next one, each later call one more."""
    first = step(1000, ("gemv", 0, 20), ("norm", 20, 2), ("gemv", 50, 20), ("norm", 70, 2))
    others = [e for at in (1200, 1300) for e in step(at, ("gemv", 0, 20), ("norm", 20, 2))]
    prompt = step(0, ("prefill", 0, 500))
    found = summarize([*prompt, *first, *others], 1, {"gemv": (1, 9), "norm": (1, 3)})
    assert (found.steps, found.launches) == (2, 2)
    assert [(kernel.launches, kernel.bytes) for kernel in found.kernels] == [(1, 9), (1, 3)]
    assert found.kernels[0].seconds == pytest.approx(20e-6)


@pytest.mark.quick
def test_a_trace_without_steps_is_none():
    assert summarize([], 2) is None
    assert summarize([Event("gemv", 0.0, 1.0)], 2) is None  # no mark
    assert summarize(step(0, ("gemv", 0, 1)), 2) is None  # the prompt alone
    copies = [*step(0, ("gemv", 0, 1)), *step(9, ("Memset (Device)", 0, 1))]
    assert summarize(copies, 2) is None
    one = summarize([*step(0, ("gemv", 0, 1)), *step(9, ("gemv", 0, 1))], 2)
    assert one.steps == 1 and one.between is None


@hypothesis_settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=12))
def test_busy_time_is_the_union_of_intervals(intervals):
    kernels = [(f"k{i}", at, length) for i, (at, length) in enumerate(sorted(intervals))]
    events = [Event(name, float(at), float(length)) for name, at, length in kernels]
    marks = [Event(MARK, -1.0, 0.5), Event(MARK, 1000.0, 0.5)]
    found = summarize([*events, *marks], 1)
    covered = {tick for at, length in intervals for tick in range(at, at + length)}
    assert found.busy == len(covered)
    assert found.span == max(covered) + 1 - min(covered)
    assert found.idle == found.span - found.busy


def test_a_profiler_that_gives_nothing_is_said(engine, monkeypatch):
    monkeypatch.setattr(trace, "record_events", lambda *given: [])
    assert "listed 0 events" in trace.trace_decode(engine, PROMPT, 4)

    def broken(*given):
        raise RuntimeError("CUPTI is missing")

    monkeypatch.setattr(trace, "record_events", broken)
    assert "CUPTI is missing" in trace.trace_decode(engine, PROMPT, 4)


def test_a_trace_knows_the_layers_and_the_bytes_of_the_graph(engine, monkeypatch):
    events = [*step(0, ("g", 0, 1)), *step(9, ("my_paged_attention", 0, 1), ("g", 2, 1))]
    monkeypatch.setattr(trace, "record_events", lambda *given: events)
    found = trace.trace_decode(engine, PROMPT, 4)
    assert found.layers == 2 and {k.name: k.bytes for k in found.kernels}["g"] is None
    known = trace.known_bytes(engine, 32)
    assert "linear" not in known  # of many sizes
    calls, moved = known["paged_attention"]
    assert calls == 2 and moved >= 32 * 2 * 2 * 16 * 4  # K and V of 2 heads of 16, float32


# Floors, bars, and how they are shown


def test_the_floor_of_a_gpu_is_what_its_rates_allow(engine):
    floor = make_floor(engine, machine(rate=1e6), 8, 4)
    floor.measure()
    read = 4 * LINEARS + (8 + 2) * 2 * 2 * 2 * 16 * 4
    assert floor.bytes_per_token == read and floor.decode == pytest.approx(1e6 / read)
    assert floor.prefill == pytest.approx(8 / (4 * LINEARS / 1e6))  # reading takes longer
    fast = make_floor(engine, machine(rate=1e30), 8, 4)
    # One row of the lm_head, and of the last layer behind its attention.
    last = 320 * 64 + 64 * 64 + 3 * 64 * 96
    assert fast.prefill == pytest.approx(8 / (2 * (8 * (LINEARS - last) + last) / 7e14))


def test_the_element_type_of_an_engine(engine, gguf):
    assert engine_dtype(engine) is torch.float32
    half = tw.compile(gguf, backend="eager", dtype="bfloat16", verify="off", max_model_len=32)
    assert engine_dtype(half) is torch.bfloat16


def gpu_latency(**changes) -> Latency:
    def series(name: str, itl: float) -> Series:
        return Series(name, (9e3, 9e3), (1 / itl, 1 / itl), 0.05, itl, (1, 2))

    rivals = (
        Rival(
            "torch.compile",
            "torch.compile reduce-overhead, bfloat16",
            series("torch.compile", 8e-3),
            first_steps=(41.8, 0.5),
            decode=Ratio(1.33, 1.3, 1.4),
            prefill=Ratio(1.0, 0.9, 1.1),
        ),
        Rival("eager", "eager", None, "OutOfMemoryError: [40 GiB]"),
    )
    kernels = [*step(0, ("p", 0, 1)), *step(9, *((f"k{i}[x]", 2 * i, 1) for i in range(14)))]
    found = Latency(
        machine(),
        "bfloat16",
        512,
        64,
        2,
        True,
        series("tilewright", 6e-3),
        rivals,
        202.0,
        9e4,
        15_010_000_000,
        summarize(kernels, 2),
    )
    return replace(found, **changes)


@pytest.mark.quick
def test_the_bars_of_a_gpu(capsys):
    found = gpu_latency()
    data = json.loads(json.dumps(latency_data(found)))
    assert data["fastest"] == "torch.compile"
    share = data["bars"].pop("decode / floor")
    assert share.pop("ratio") == pytest.approx(1 / 6e-3 / 202)
    assert share == {"against": "floor", "bar": 0.88, "met": False}
    assert data["bars"] == {  # of the 8B shape, by its bytes
        "decode / torch.compile": {
            "against": "torch.compile",
            "bar": 1.5,
            "ratio": 1.33,
            "met": False,
        }
    }
    assert data["mbu"] == pytest.approx(15.01e9 / 6e-3 / 3e12)
    assert data["contenders"]["eager"]["error"] == "OutOfMemoryError: [40 GiB]"
    assert data["contenders"]["torch.compile"]["first_steps_seconds"] == [41.8, 0.5]
    assert data["contenders"]["torch.compile"]["series"]["decode_tokens_per_second"] == 125
    assert len(data["trace"]["kernels"]) == 14 and data["trace"]["launches_per_layer"] == 7
    print_latency(found)
    text = capsys.readouterr().out
    for part in (
        "decode 1.33× torch.compile (95% interval 1.30 to 1.40); bar 1.5×: not met",
        "decode 0.83× the floor",
        "bar 0.88×: not met",
        "eager failed: OutOfMemoryError: [40 GiB]",
        "tokens not compared",
        "first steps of torch.compile, not counted: 41.8, 0.5 s",
        "14 kernels, 7.0 a layer of 2",
        "k0[x]",
        "and 2 more",
        "bfloat16 matmul 700 TFLOP/s",
    ):
        assert part in text


@pytest.mark.quick
def test_a_slower_engine_and_no_trace(capsys):
    found = gpu_latency(trace="the profiler listed 0 events")
    slower = replace(found.rivals[0], decode=Ratio(0.97, 0.9, 1.0))
    # Of a model of another shape no more is asked than to be faster than torch.compile.
    found = replace(found, rivals=(slower,), bytes_per_token=5_000_000_000)
    assert {n: b["met"] for n, b in latency_data(found)["bars"].items()} == {
        "decode / torch.compile": False
    }
    assert latency_data(found)["trace_note"] == found.trace
    print_latency(found)
    text = capsys.readouterr().out
    assert "faster: no" in text and "the profiler listed 0 events" in text


@pytest.mark.quick
def test_short_names_of_kernels():
    assert short_name("void at::native::(anonymous namespace)::sum<4>(int*)") == "sum<4>"
    assert short_name("add_rms_norm_1f") == "add_rms_norm_1f"
    assert len(short_name("x" * 500)) == 64

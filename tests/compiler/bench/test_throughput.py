"""``bench throughput``: steady steps, floors, bars, contenders at each batch size."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewright as tw
from cli_running import refused, run
from tilewright.compiler.bench import throughput as bench
from tilewright.compiler.bench.bars import BARS, SHAPE_BARS, SHAPES, find_bars
from tilewright.compiler.bench.contenders import Batch, Compiled, Eager
from tilewright.compiler.bench.machine import Machine
from tilewright.compiler.bench.reference import ReferenceModel
from tilewright.compiler.bench.steady import steady_part
from tilewright.compiler.bench.throughput import (
    measure_throughput,
    needed_length,
    tokens_ahead,
    weight_bytes_read,
)
from tilewright.compiler.cli.bench_options import parse_batches, parse_only
from tilewright.compiler.cli.bench_throughput import print_throughput, throughput_data
from tilewright.errors import UsageError
from tiny_gguf import write_tiny_gguf

LINEARS = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96) + 320 * 64  # weights of the tiny model
KV = 2 * 2 * 2 * 16 * 4  # bytes a token: layers, K and V, heads, width, float32


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("throughput") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture(scope="module")
def engine(gguf):
    options = {"backend": "eager", "verify": "off", "max_model_len": 64, "max_batch_size": 3}
    return tw.compile(gguf, **options)


@pytest.fixture(scope="module")
def reference(gguf):
    return ReferenceModel(str(gguf))


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    """No probe: it takes long, and the floor is then known."""
    machine = Machine("cpu", "cpu", 2, 1, 0.0, 1e9, None, None, None, {})
    monkeypatch.setattr(bench, "probe_machine", lambda target, device: machine)


# Steady steps


@pytest.mark.quick
def test_the_steady_part_begins_with_the_last_and_ends_with_the_first():
    early = [1.0, 2.0, 3.0, 4.5, 6.0, 7.0]
    late = [3.0, 4.5, 6.0, 7.0, 8.0]
    found = steady_part(Batch(0.5, [[0] * 6, [0] * 5], [early, late]), 9)
    assert found.steps == (1.5, 1.5, 1.0) and found.prefill == 2.5 and found.sequences == 2
    assert found.generated == (3 + 1) / 2 + 1.5  # at the first of its steps, and half of them
    assert found.tokens_per_second == pytest.approx(2 * 3 / 4)
    assert steady_part(Batch(0.5, [[0] * 6, [0] * 5], [early, late]), 2).steps == (1.5, 1.5)
    with pytest.raises(ValueError, match="no step in which all"):
        steady_part(Batch(0.0, [[0], [0]], [[1.0], [2.0]]), 4)


times = st.floats(1e-4, 1e-2)


@given(st.lists(times, min_size=12, max_size=30), st.lists(st.integers(0, 8), min_size=1))
def test_steady_steps_are_those_that_all_take_part_in(lengths, starts):
    clock = [*accumulate(lengths, initial=0.0)]
    stamps = [clock[start : start + 12] for start in starts if start + 12 <= len(clock)]
    stamps = stamps or [clock[:12]]
    begin, end = max(s[0] for s in stamps), min(s[-1] for s in stamps)
    inside = [at for at in clock if begin <= at <= end]
    found = steady_part(Batch(0.0, [], stamps), 100)
    assert found.steps == pytest.approx([b - a for a, b in zip(inside, inside[1:], strict=False)])


@pytest.mark.quick
def test_lengths_leave_room_for_those_that_start_early():
    assert tokens_ahead(128, 1024) == -(-128 * 1024 // (2048 - 128))
    assert needed_length((1,), 1024, 64) == 1024 + 128  # a step ahead at most, rounded up
    assert needed_length((1, 128), 1024, 64) >= 1024 + 64 + 1 + tokens_ahead(128, 1024)


# Measurements


def test_batches_beside_eager(engine, reference, capsys):
    found = measure_throughput(
        engine,
        lambda: reference,
        batches=(1, 3),
        compare=("eager",),
        context=20,
        new_tokens=6,
        repeat=2,
    )
    assert weight_bytes_read(engine) == 4 * LINEARS
    for result, batch in zip(found.results, (1, 3), strict=True):
        assert result.batch == batch and len(result.ours) == 2
        assert {len(run.steps) for run in result.ours} == {6}
        held = 20 + sum(run.generated for run in result.ours) / 2
        assert result.bytes == pytest.approx(4 * LINEARS + KV * batch * held, abs=1)
        assert result.floor == pytest.approx(result.bytes / 1e9)
        assert result.share_of_floor == pytest.approx(result.floor / result.seconds)
        assert result.tokens_per_second == pytest.approx(batch / result.seconds, rel=0.5)
        (eager,) = result.rivals
        assert eager.error is None and len(eager.runs) == 2
        assert eager.runs[0].sequences == batch and eager.runs[0].generated == 1 + 3
        assert eager.ratio.low <= eager.ratio.value <= eager.ratio.high
    assert [bar.against for bar, _, _ in found.results[0].bars] == ["eager"]
    assert found.results[1].bars == ()  # they are of batch 1
    data = json.loads(json.dumps(throughput_data(found)))
    one = data["results"][1]
    assert one["fastest"] == "eager" and one["prefill_seconds"] > 0 and one["preemptions"] == 0
    assert one["padding_tokens"] == one["padding_share"] == 0  # pages need none
    assert one["prefill_tokens_per_second"] == pytest.approx(3 * 20 / one["prefill_seconds"])
    print_throughput(found)
    text = capsys.readouterr().out
    assert "the fastest contender, eager" in text and "Hugging Face eager, float32" in text


def test_preemptions_and_padding_are_said(engine, monkeypatch, capsys):
    schedule = engine.loop.scheduler.schedule

    def preempting():
        running = engine.loop.scheduler.running
        if len(running) == 2 and not running[1].timings.preemptions:
            engine.loop.scheduler.preempt(running[1])
        return schedule()

    monkeypatch.setattr(engine.loop.scheduler, "schedule", preempting)
    found = measure_throughput(engine, None, batches=(2,), context=6, new_tokens=4, repeat=2)
    assert found.results[0].preemptions == 3  # the run that is not counted is warned of too
    print_throughput(found)
    assert "batch 2: 3 preemptions" in capsys.readouterr().out
    padded = replace(found.results[0], padding_tokens=3, padding_share=0.25)
    print_throughput(replace(found, results=(padded,)))
    assert "batch 2: 25.0% of the tokens computed were padding" in capsys.readouterr().out


def test_prompts_are_distinct_and_the_same_for_all(engine, reference, monkeypatch):
    seen = {"ours": [], "theirs": []}
    generate, run_batch = engine.generate, Eager.run_batch

    def ours(prompts, params):
        seen["ours"].append(prompts)
        return generate(prompts, params)

    def theirs(self, prompts, new_tokens):
        seen["theirs"].append(prompts)
        return run_batch(self, prompts, new_tokens)

    monkeypatch.setattr(engine, "generate", ours)
    monkeypatch.setattr(Eager, "run_batch", theirs)
    options = {"batches": (2,), "compare": ("eager",), "context": 9, "new_tokens": 3, "repeat": 2}
    measure_throughput(engine, lambda: reference, **options)
    assert seen["ours"] == seen["theirs"] and len(seen["ours"]) == 3
    flat = [tuple(prompt) for prompts in seen["ours"] for prompt in prompts]
    assert len({*flat}) == 6


def test_a_batch_of_contenders_decodes_each_prompt_as_alone(reference, monkeypatch):
    prompts = torch.randint(320, (3, 11), generator=torch.Generator().manual_seed(1)).tolist()
    monkeypatch.setattr("tilewright.compiler.bench.contenders.PREFILL_TOKENS", 12)  # 4 at once
    for contender in (Eager(reference), Compiled(reference, 24, lambda forward: forward)):
        found = contender.run_batch(prompts, 5)
        assert [len(stamps) for stamps in found.stamps] == [5] * 3
        for prompt, tokens in zip(prompts, found.token_ids, strict=True):
            expected = reference.model.generate(
                torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=None
            )
            assert [*tokens] == expected[0, 11:].tolist()
        contender.close()


def test_a_contender_that_fails_leaves_the_others(engine, reference, monkeypatch):
    def make(name, model, length, sequences):
        if name == "torch.compile":
            raise RuntimeError("no compiler\nfound")
        return Eager(model)

    monkeypatch.setattr(bench, "make_contender", make)
    found = measure_throughput(
        engine,
        lambda: reference,
        batches=(2,),
        compare=("torch.compile", "eager"),
        context=8,
        new_tokens=3,
        repeat=1,
    )
    compiled, eager = found.results[0].rivals
    assert compiled.error == "RuntimeError: no compiler found" and compiled.ratio is None
    assert found.results[0].fastest is eager


@pytest.mark.quick
def test_what_does_not_fit_is_refused(engine):
    for given_, said in (
        ({"batches": (1, 8)}, "at most 3 sequences.*--max-batch-size 8"),
        ({"batches": (0,)}, "1 or more"),
        ({"context": 60}, "at most 64 tokens.*--max-model-len 128"),
        ({"new_tokens": 0}, "--new-tokens"),
        ({"repeat": 0}, "--repeat"),
    ):
        options = {"batches": (1,), "context": 8, "new_tokens": 4, "repeat": 1, **given_}
        with pytest.raises(UsageError, match=said):
            measure_throughput(engine, None, **options)


# Bars


@pytest.mark.quick
def test_bars_are_of_the_shape_the_batch_and_the_device():
    assert find_bars("cpu", SHAPES["8B"]) == BARS["cpu"] and find_bars("cpu", 1, 8) == ()
    h100 = "NVIDIA H100 80GB HBM3"
    assert find_bars(h100, SHAPES["8B"]) == SHAPE_BARS["8B", 1]  # none twice against a contender
    many = find_bars(h100, SHAPES["8B"] + 60_000_000, 32)
    assert [(bar.against, bar.value) for bar in many] == [
        ("vllm", 1.12),
        ("floor", 0.79 * 1.12),
        ("torch.compile", 1.0),
    ]
    assert find_bars(h100, 5_000_000_000, 32) == BARS["cuda"]
    assert len({bar.name for bar in many}) == 3


def test_bars_against_the_floor(engine, monkeypatch):
    machine = Machine("h100", "NVIDIA H100", 2, 1, 0.0, 1e9, 1e9, 1e12, None, {})
    monkeypatch.setattr(bench, "probe_machine", lambda target, device: machine)
    monkeypatch.setattr(bench, "weight_bytes_read", lambda engine: SHAPES["8B"])
    found = measure_throughput(engine, None, batches=(1,), context=8, new_tokens=3, repeat=1)
    ((bar, ratio, met),) = found.results[0].bars
    assert bar.against == "floor" and met  # 15 s at this rate, for a tiny model
    assert ratio.value == pytest.approx(found.results[0].share_of_floor, rel=1e-3)
    slow = replace(found.results[0], bars=((bar, replace(ratio, value=0.5), False),))
    data = throughput_data(replace(found, results=(slow,)))
    assert data["results"][0]["bars"]["decode / floor"]["met"] is False


# The verb


@pytest.mark.quick
def test_lists_of_numbers_and_names():
    assert parse_batches("1, 8,8,32") == (1, 8, 32)
    for wrong in ("", "1,", "0", "-1", "two"):
        with pytest.raises(UsageError, match="--batch 1,8,32"):
            parse_batches(wrong)
    assert parse_only(None) == () and parse_only("linear, ,norm,linear") == ("linear", "norm")


def test_the_verb_compiles_a_model_for_what_it_measures(gguf):
    sizes = ("--batch", "2,9", "--context", 24, "--new-tokens", 4, "--repeat", 1)
    result = run("bench", "throughput", gguf, "--backend", "eager", *sizes, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [one["batch"] for one in found["results"]] == [2, 9]  # 9: more than the default
    assert found["context"] == 24 and found["results"][0]["contenders"] == {}


def test_the_verb_refuses_more_than_the_engine_takes(engine, tmp_path):
    engine.save(tmp_path / "engine")
    refused(
        run("bench", "throughput", tmp_path / "engine", "--batch", "4", "--context", 8),
        "at most 3 sequences",
        "--max-batch-size 4",
    )
    result = run("bench", "throughput", tmp_path / "engine", "--batch", 2, "--context", 8)
    refused(result, "at most 64 tokens")

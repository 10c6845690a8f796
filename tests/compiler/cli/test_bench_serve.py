"""``bench serve`` from the shell: its figures, its exit codes, and what it refuses."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import tilewright as tw
from cli_running import refused, run
from tilewright.compiler.bench import machine
from tilewright.compiler.bench.phases import Phase, rate_phases
from tilewright.compiler.cli.bench_serve import _encoder
from tilewright.errors import UsageError

SMALL = ("--num-prompts", 5, "--input-len", 9, "--output-len", 4, "--warmup", 1)


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    """No probe: it takes long."""
    known = machine.Machine("cpu", "cpu", 2, 1, 0.0, 1e9, None, None, None, {"torch": "2"})
    monkeypatch.setattr(machine, "probe_machine", lambda target, device: known)


def test_figures_have_the_names_that_vllm_gives_them(engine, tmp_path):
    path = tmp_path / "trace.json"
    load = ("--rate", 1000, "--spread", 0.5, "--goodput", "ttft:1e6 tpot:1e6", "--trace", path)
    result = run("bench", "serve", engine, *SMALL, *load, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["completed"], found["failed"], found["errors"]) == (5, 0, [])
    tokens = found["total_input_tokens"] + found["total_output_tokens"]
    assert found["total_token_throughput"] == pytest.approx(tokens / found["duration"])
    assert found["output_throughput"] * found["duration"] == pytest.approx(
        found["total_output_tokens"]
    )
    assert found["request_goodput"] == found["request_throughput"] > 0
    for name in ("ttft", "tpot", "itl", "e2el"):
        low, high = found[f"median_{name}_ms"], found[f"p99_{name}_ms"]
        assert 0 < low <= high and found[f"mean_{name}_ms"] > 0
    assert found["mean_queue_ms"] <= found["mean_ttft_ms"] < found["mean_e2el_ms"]
    prefill, decode = found["phases"]["prefill"], found["phases"]["decode"]
    assert prefill["tokens"] + decode["tokens"] == tokens - found["completed"]
    assert decode["mbu"] > 0 and prefill["mfu"] > 0
    begun = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "B"]
    assert len(begun) == 5  # without those of the warm-up


def test_conversations_as_a_table(engine):
    talk = ("--workload", "multi-turn", "--turns", 2, "--concurrency", 2, "--no-prefix-caching")
    result = run("bench", "serve", engine, *SMALL, *talk)
    assert result.exit_code == 0, result.stderr
    for part in ("multi-turn, all at once, at most 2 at once", "5 completed, 0 failed", "20 out"):
        assert part in result.stdout
    for part in ("TTFT", "TPOT", "ITL", "E2EL", "queue time", "p99", "prefix cache  off", "MBU"):
        assert part in result.stdout


def test_a_prompt_of_a_file_that_is_too_long_is_a_finding(engine, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "the quick"}, {"prompt": [1] * 99}, {"prompt": [1, 2], "output_tokens": 3}]
    path.write_text("\n".join(map(json.dumps, lines)))
    args = ("bench", "serve", engine, *SMALL, "--workload", "file", "--file", path)
    result = run(*args, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (2, 1, 7)
    assert "at most 63 tokens" in found["errors"][0]
    assert found["asked"]["rate"] == "inf" and found["request_goodput"] is None
    shown = run(*args)
    assert shown.exit_code == 1 and "failed: the prompt: expected at most 63" in shown.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--workload", "chat"), "shared-prefix"),
        (("--workload", "file"), "--file FILE"),
        (("--file", "prompts.jsonl"), "--file prompts.jsonl"),
        (("--rate", 0), "--rate 4"),
        (("--rate", "nan"), "--rate 4"),
        (("--fixed",), "leave --fixed out"),
        (("--goodput", "itl:5"), "ttft:200 tpot:30"),
        (("--trace", "none/trace.json"), "make the folder first"),
    ],
)
def test_options_that_make_no_load_are_refused_before_anything_is_loaded(args, said):
    refused(run("bench", "serve", "no-engine", *args), said)


def test_a_load_that_outgrows_the_context_is_refused(engine):
    result = run("bench", "serve", engine, "--input-len", 40, "--output-len", 25)
    refused(result, "at most 64 tokens", "--max-model-len 128")


def test_text_needs_a_tokenizer():
    encode = _encoder(SimpleNamespace(tokenizer=None, image=SimpleNamespace(name="bare")))
    with pytest.raises(UsageError, match="engine bare: .*lists of token ids"):
        encode("the quick")


def test_utilisation_of_phases_is_that_of_the_linears_and_the_cache(engine):
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96
    head, kv = 320 * 64, 2 * 2 * 2 * 16 * 4
    weights = 2 * layer + head
    every = layer + 64 * (64 + 2 * 32)  # behind the last attention only rows that are sampled go on
    decode = Phase(steps=10, tokens=30, sequences=30, context=500, seconds=0.5)
    prefill = Phase(steps=2, tokens=100, sequences=3, context=100, seconds=0.25)
    loaded = tw.load(engine)
    rate_phases(loaded, {"prefill": prefill, "decode": decode}, "float32")
    read, peak = loaded.target.dram_gb_per_s * 1e9, loaded.target.flops_per_second("float32")
    assert decode.mbu == pytest.approx((10 * 4 * weights + 500 * kv) / read / 0.5)
    assert decode.mfu == pytest.approx(30 * 2 * weights / peak / 0.5)
    flops = 100 * 2 * every + 3 * 2 * (weights - every)
    assert prefill.mfu == pytest.approx(flops / peak / 0.25)
    assert prefill.mbu == pytest.approx((2 * 4 * weights + 100 * kv) / read / 0.25)
    idle = Phase()
    rate_phases(loaded, {"decode": idle}, "float32")
    assert idle.mfu is idle.mbu is None

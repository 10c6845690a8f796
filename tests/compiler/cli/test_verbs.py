"""Each verb does what it says, and its --json is pure JSON with the figures."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import tilewright as tw
from cli_running import COMPILE, run, spawn


def data(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.quick
def test_version_and_help():
    result = run("--version")
    assert result.stdout.strip() == f"tilewright {tw.__version__}" and result.exit_code == 0
    help_text = run("--help").stdout
    for verb in ("compile", "generate", "bench", "inspect", "verify", "targets"):
        assert verb in help_text
    assert version("typer")


@pytest.mark.quick
def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from tilewright.compiler.cli.app import app; "
        "print([m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.quick
def test_targets():
    found = data(run("targets", "--json"))
    assert {row["name"] for row in found["targets"]} >= {"cpu", "h100", "b200"}
    assert found["detected"].startswith("cpu") or torch.cuda.is_available()
    assert "h100" in run("targets").stdout


def test_compile_writes_an_engine_that_loads(engine):
    assert (engine / "manifest.json").exists()
    assert isinstance(tw.load(engine), tw.Engine)


def test_compile_folder_as_json(folder, tmp_path):
    found = data(run("compile", folder, "-o", tmp_path / "e", *COMPILE, "--json"))
    assert found["backend"] == "eager" and found["report"]["aten"] == []
    assert Path(found["engine"]).is_dir()


def test_generate_equals_the_library(engine):
    loaded = tw.load(engine)
    ids = loaded.chat_prompt([{"role": "user", "content": "the quick"}])
    expected = loaded.generate([ids], tw.SamplingParams(max_new_tokens=8, ignore_eos=True))[0]
    args = ("generate", engine, "the quick", "--max-new-tokens", 8, "--ignore-eos")
    found = data(run(*args, "--json"))
    assert found["prompt_token_ids"] == ids
    assert found["completions"][0]["token_ids"] == expected.token_ids
    streamed = run(*args)
    assert streamed.stdout == expected.text + "\n" and "8 new tokens" in streamed.stderr


def test_generate_without_chat_from_stdin(engine):
    args = ("generate", engine, "-", "--no-chat", "--max-new-tokens", 4, "--json", "-n", 2)
    found = data(run(*args, input="the quick brown"))
    assert found["prompt_token_ids"] == tw.load(engine).tokenizer.encode("the quick brown")
    assert len(found["completions"]) == 2


def test_generate_with_a_system_message(engine):
    args = ("generate", engine, "fox", "--max-new-tokens", 1, "--json")
    short, long = data(run(*args)), data(run(*args, "--system", "be brief"))
    assert len(long["prompt_token_ids"]) > len(short["prompt_token_ids"])


def test_generate_compiles_a_model_in_memory(gguf):
    args = ("generate", gguf, "the", "--backend", "eager", "--max-new-tokens", 2, "--json")
    sliding = ("--window", 20, "--sinks", 2)
    assert len(data(run(*args, *sliding))["completions"][0]["token_ids"]) <= 2
    refused = run(*args, "--window", 2)
    assert refused.exit_code == 2 and "KVCacheConfig.window" in refused.stderr


def test_an_engine_has_the_window_that_it_was_compiled_with(engine):
    refused = run("generate", engine, "the", "--window", 20)
    assert refused.exit_code == 2 and "--window" in refused.stderr


def test_verify_passes(engine):
    found = data(run("verify", engine, "--json"))
    names = [name for name, _ in found["checks"]]
    assert found["ok"] and names == ["files", "graphs", "program, prefill", "program, decode"]


def test_verify_finds_a_program_that_computes_something_else(engine, tmp_path):
    from dataclasses import replace

    from tilewright.runtime.folder import load_image, save_engine

    image = load_image(engine)
    calls = list(image.program.calls)
    where = next(i for i, call in enumerate(calls) if call.kernel == "eager/paged_attention")
    calls[where] = replace(calls[where], attrs={**calls[where].attrs, "scale": 0.9})
    wrong = replace(image, program=replace(image.program, calls=tuple(calls)))
    save_engine(wrong, tmp_path / "wrong")
    result = run("verify", tmp_path / "wrong")
    assert result.exit_code == 1 and "program, prefill" in result.stderr
    assert "ok  files" in result.stdout


def test_verify_a_module_engine(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    tw.compile(module, (torch.randn(3, 8),), backend="eager").save(tmp_path / "m")
    assert data(run("verify", tmp_path / "m", "--json"))["checks"][-1][0] == "program, call"
    result = run("generate", tmp_path / "m", "hello")
    assert result.exit_code == 2 and "causal language model" in result.stderr


def test_bench_latency_beside_eager(engine, gguf):
    sizes = ("--prompt-tokens", 24, "--new-tokens", 8, "--repeat", 2)
    found = data(run("bench", "latency", engine, "--compare", "eager", *sizes, "--json"))
    eager = found["contenders"]["eager"]
    assert eager["agreeing_tokens"] == 8  # the oracle: Hugging Face's own tokens
    ratio = eager["decode_ratio"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"] and eager["error"] is None
    assert found["floor_decode"] > 0 and found["floor_prefill"] > 0 and found["mbu"] > 0
    assert {*found["bars"]} == {"decode / eager", "prefill / eager"}
    assert found["machine"]["device"] == "cpu" and found["trace"] is None
    # Weights of the linears in float32 (7 a layer, 2 layers, and the lm_head), and the KV cache.
    linears = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96) + 320 * 64
    assert found["bytes_per_token"] == 4 * linears + 28 * 2 * 2 * 2 * 16 * 4


def test_bench_latency_as_a_table(engine):
    sizes = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeat", 1)
    result = run("bench", "latency", engine, *sizes)
    assert result.exit_code == 0, result.stderr
    assert "matmuls alone" in result.stdout and "MBU" in result.stdout


def test_bench_latency_of_contenders_that_there_are_not(engine):
    result = run("bench", "latency", engine, "--compare", "eager,llama")
    assert result.exit_code == 2 and "torch.compile, eager" in result.stderr


def test_bench_startup(engine):
    found = data(run("bench", "startup", engine, "--repeat", 1, "--json"))
    medians = found["median"]
    phases = {"import", "ready", "weights", "first_token", "process", "beyond_weights"}
    assert set(medians) == phases
    assert 0 < medians["weights"] < medians["ready"] < medians["process"]
    assert medians["beyond_weights"] == medians["process"] - medians["weights"]


@pytest.mark.quick
def test_the_bootstrap_holds_the_ratio():
    from tilewright.compiler.bench.statistics import paired_ratio

    ratio = paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0) or ratio.low <= 2 <= ratio.high
    wide = paired_ratio([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0])
    assert 1.0 <= wide.low < wide.value == 2.5 < wide.high <= 4.0


def test_inspect_as_text(engine):
    text = run("inspect", engine).stdout
    for part in ("Passes", "Ops at decode", "Kernel calls", "Memory plan", "Notes and fallbacks"):
        assert part in text
    assert "eager/linear" in text


def test_inspect_as_json(engine):
    found = data(run("inspect", engine, "--json"))
    qkv, rest, head = 64 * (64 + 2 * 32), 64 * 64 + 3 * 64 * 96, 320 * 64
    for setting, tokens in (("prefill", 64), ("decode", 1)):
        linear = next(row for row in found["costs"][setting] if row["op"] == "linear")
        # Logits are of the last token, and so is all behind the last layer's attention.
        assert linear["flops"] == 2 * (tokens * (2 * qkv + rest) + rest + head)
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert found["memory"]["decode"]["arena_bytes"] >= found["memory"]["decode"]["live_bytes"]


def test_inspect_one_pass_and_a_difference(engine):
    from tilewright.ir.parser import parse_graph

    text = run("inspect", engine, "--pass", "captured").stdout
    assert str(parse_graph(text)) == text
    names = [path.stem for path in sorted((engine / "graphs").glob("*.txt"))]
    diff = run("inspect", engine, "--diff", names[0], names[-1]).stdout
    assert re.search(r"^\+.*paged_attention", diff, re.MULTILINE)


def test_output_into_a_pipe_that_closes(engine):
    process = spawn("inspect", engine, "--pass", "captured")
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0, stderr
    assert "Traceback" not in stderr

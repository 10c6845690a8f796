"""Quantized engines, as users have them: compiled, saved, loaded, reported, from the shell."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import onnx
import pytest
import torch

import tilewright as tw
from cli_running import refused, run
from tilewright.compiler.calibrate.text import read_text
from tilewright.errors import UnsupportedError, UsageError
from tiny_gguf import write_tiny_gguf

IDS = torch.tensor([3, 50, 7, 211, 9, 120])
OPTIONS = {"backend": "eager", "max_model_len": 64, "max_batch_size": 2}


def _facts(engine: tw.Engine) -> dict:
    facts = engine.report()["quantization"]
    assert isinstance(facts, dict)
    return facts


@pytest.fixture(scope="module")
def plain(tiny_gguf: Path) -> tw.Engine:
    return tw.compile(tiny_gguf, verify="structure", **OPTIONS)


@pytest.mark.parametrize(
    ("quantize", "bits", "error"),
    [
        ("int8", 8.5, 0.05),
        ("fp8", 8.5, 0.2),
        ("fp8-tensor", 8.01, 0.2),
        (tw.QuantConfig("int4", group=32, method="gptq"), 4.5, 0.5),
    ],
    ids=["int8", "fp8", "fp8-tensor", "int4-gptq"],
)
def test_an_engine_says_its_bits_and_is_near(
    tiny_gguf: Path, plain: tw.Engine, monkeypatch, quantize, bits: float, error: float
):
    monkeypatch.setenv("TILEWRIGHT_VERIFY", "full")
    engine = tw.compile(tiny_gguf, quantize=quantize, **OPTIONS)
    facts = _facts(engine)
    assert facts["linears"] == 8 and set(facts["kept"]) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert facts["bits_per_weight"] == pytest.approx(bits, abs=0.1)
    assert engine.report()["parameters"] == plain.report()["parameters"]
    wanted, found = plain(IDS), engine(IDS)
    assert (wanted - found).norm() < error * wanted.norm()


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_batches_do_not_mix_and_folders_come_back(tiny_gguf: Path, tmp_path: Path, backend: str):
    options = {**OPTIONS, "backend": backend}
    engine = tw.compile(tiny_gguf, quantize="int8", verify="structure", **options)
    params = tw.SamplingParams(max_new_tokens=6, ignore_eos=True)
    prompts = [[5, 9, 40], [17, 3, 200, 31, 8]]
    together = [c.token_ids for c in engine.generate(prompts, params)]
    assert together == [engine.generate([p], params)[0].token_ids for p in prompts]
    for form in ("embed", "reference"):
        engine.save(tmp_path / form, weights=form)
        loaded = tw.load(tmp_path / form)
        assert torch.equal(loaded(IDS), engine(IDS))
        assert _facts(loaded)["scheme"] == "int8"
    expression = json.loads((tmp_path / "reference" / "weights.json").read_text())["weights"]
    assert any(text.startswith("quantize_codes(") for text in expression.values())


@pytest.mark.parametrize(
    ("quantize", "error"),
    [
        (tw.QuantConfig("int4", group=32, lm_head=True), 1e-4),
        (tw.QuantConfig("int4", group=32, lm_head=True, compute="int8"), 0.03),
        (tw.QuantConfig("int8", method="rtn", lm_head=True), 0.03),
    ],
    ids=["int4", "int4-int8", "int8"],
)
def test_onnx_runtime_reads_packed_weights(
    tiny_gguf: Path, tmp_path: Path, quantize: tw.QuantConfig, error: float
):
    options = {"quantize": quantize, "max_model_len": 64}
    engine = tw.compile(tiny_gguf, backend="onnxruntime", verify="sample", **options)
    engine.save(tmp_path)
    (file,) = tmp_path.rglob("*.onnx")
    ops = [node.op_type for node in onnx.load(file, load_external_data=False).graph.node]
    assert ops.count("MatMulNBits") == _facts(engine)["linears"] == 9
    assert not {"Gemm", "MatMul", "MatMulInteger"} & set(ops)
    wanted, found = (
        tw.compile(tiny_gguf, backend="eager", verify="off", **options)(IDS),
        engine(IDS),
    )
    assert (wanted - found).norm() < error * wanted.norm()


def test_groups_of_int8_hold_eight_bits_of_gguf_without_a_loss(tmp_path: Path):
    path = tmp_path / "eight.gguf"
    write_tiny_gguf(path, quantization="Q8_0")
    plain = tw.compile(path, verify="off", **OPTIONS)
    config = tw.QuantConfig("int8-weight", group=32)
    engine = tw.compile(path, quantize=config, verify="off", **OPTIONS)
    torch.testing.assert_close(engine(IDS), plain(IDS), rtol=1e-6, atol=1e-6)


def test_what_the_file_holds_anyway_is_flagged(tmp_path: Path):
    path = tmp_path / "four.gguf"
    write_tiny_gguf(path, quantization="Q4_1")
    found = []
    for symmetric in (True, False):
        config = tw.QuantConfig("int4", group=32, symmetric=symmetric)
        engine = tw.compile(path, quantize=config, verify="off", **OPTIONS)
        found.append(_facts(engine)["source_in_four_bits"])
    assert found == [False, True]


def test_modules_are_quantized_too():
    module = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8))
    x = torch.randn(5, 64)
    engine = tw.compile(module.eval(), (x,), backend="eager", quantize="int8-weight", verify="full")
    assert _facts(engine)["linears"] == 2
    torch.testing.assert_close(engine(x), module(x), atol=0.02, rtol=0)
    with pytest.raises(UnsupportedError, match="a plain module"):
        tw.compile(module, (x,), backend="eager", quantize="int8")
    with pytest.raises(UnsupportedError, match="none that may be quantized"):
        tw.compile(torch.nn.ReLU(), (x,), backend="eager", quantize="int8-weight")


def test_wrong_options_are_refused(tiny_gguf: Path):
    with pytest.raises(UsageError, match="int8-weight, int8"):
        tw.compile(tiny_gguf, quantize="int3", **OPTIONS)
    with pytest.raises(UsageError, match="a pattern"):
        tw.compile(tiny_gguf, quantize=tw.QuantConfig("int4", skip=("nothing.*",)), **OPTIONS)
    with pytest.raises(UnsupportedError, match="fp8-weight"):
        tw.compile(tiny_gguf, quantize="fp8", target="a100")


def test_the_verb_writes_an_engine_and_a_report(tiny_gguf: Path, tmp_path: Path):
    place = tmp_path / "engine"
    common = ("--backend", "eager", "--max-model-len", 64, "--verify", "structure")
    options = ("--scheme", "int4", "--group", 32, "--method", "awq", "--skip", "*.0.*down*")
    measured = ("--report", "--tokens", 200)
    done = run("quantize", tiny_gguf, "-o", place, *options, *measured, *common, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)["quantization"]
    assert facts["linears"] == 7 and len(facts["kept"]) == 3
    quality = facts["quality"]
    assert quality["tokens"] == 199 and not quality["held_out"]
    assert len(quality["layers"]) == 7
    assert _facts(tw.load(place)) == facts
    assert run("verify", place).exit_code == 0
    shown = run("inspect", place).stdout
    assert "int4 (awq), 4." in shown and "layers that lost most" in shown
    assert json.loads(run("inspect", place, "--json").stdout)["quantization"] == facts


def test_the_verb_measures_alone_and_names_what_to_skip(tiny_gguf: Path, tmp_path: Path):
    text = tmp_path / "held-out.txt"
    text.write_text(read_text(None)[:1500])
    common = ("--backend", "eager", "--max-model-len", 64, "--verify", "off")
    verb = ("quantize", tiny_gguf, "--scheme", "int4", "--group", 0)
    shown = run(*verb, "--sensitivity", "--text", text, "--tokens", 9999, *common)
    assert shown.exit_code == 0, shown.output
    for part in ("bits per weight", "perplexity", "top-1 agreement", "all of it (9999", "KL alone"):
        assert part in shown.stdout
    assert "no folder" not in shown.stdout and "engine written" not in shown.stdout
    skips = shlex.split(shown.stdout.splitlines()[-1])
    assert skips[::2] == ["--skip"] * 8
    left = run(*verb, "--report", "--tokens", 99, *skips[:12], *common, "--json")
    assert left.exit_code == 0, left.output
    facts = json.loads(left.stdout)["quantization"]
    assert facts["linears"] == 2 and set(skips[1:12:2]) < set(facts["kept"])
    refused(run(*verb), "-o FOLDER")
    refused(run(*verb, "--report", "--format", "compressed-tensors"), "-o FOLDER")


def test_the_verb_refuses_bad_input(tiny_gguf: Path, tmp_path: Path):
    place = tmp_path / "engine"
    refused(run("quantize", tiny_gguf, "-o", place, "--scheme", "int5"), "int8-weight")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    options = ("--scheme", "int4", "--method", "gptq", "--backend", "eager")
    done = run("quantize", tiny_gguf, "-o", place, *options, "--calibrate", short)
    refused(done, "at least 1024 tokens", "short.txt")
    refused(run("compile", tiny_gguf, "-o", place, "--quantize", "int5"), "int8-weight")
    assert not place.exists()

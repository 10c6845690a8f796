"""`tilewright compile --emit`: a folder that onnxruntime alone runs, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli_running import refused, run
from tilewright.codegen.tensorrt import flavor
from tilewright.compiler import emit_tensorrt
from tilewright.compiler.emit_tensorrt import EmittedEngine

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "generate_onnx.py"
# What the example promises to need is onnxruntime and numpy.
ALONE = (
    "import runpy, sys; sys.modules.update(dict.fromkeys(['onnx', 'tilewright', 'tokenizers', "
    "'torch', 'transformers'])); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
)
PROMPT, NEW = (5, 9, 3, 17, 4), 12


@pytest.fixture(scope="module")
def emitted(folder: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("emitted") / "onnx"
    result = run("compile", folder, "--emit", "onnx", "-o", path, "--max-model-len", 64, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["emitted"] == str(path) and facts["flavor"] == "standard" and facts["nodes"] > 20
    return path


def example(folder: Path, *args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", ALONE, EXAMPLE, folder, *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def test_the_example_generates_hugging_faces_tokens(folder: Path, emitted: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([PROMPT])
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
    )
    done = example(emitted, ",".join(map(str, PROMPT)), NEW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ",".join(map(str, wanted[0, len(PROMPT) :].tolist()))
    assert done.stderr == ""  # no warning that caches are copied
    assert len(EXAMPLE.read_text().splitlines()) < 60


def test_the_example_refuses_what_is_too_long(emitted: Path) -> None:
    done = example(emitted, ",".join(["1"] * 64))
    assert done.returncode != 0 and "64 tokens" in done.stderr and "Traceback" not in done.stderr


def test_what_stands_beside_the_model(emitted: Path) -> None:
    names = {path.name for path in emitted.iterdir()}
    assert {"model.onnx", "model.onnx.data", "generation.json", "tokenizer.json"} <= names
    facts = json.loads((emitted / "generation.json").read_text())
    assert facts["max_length"] == 64 and facts["model"] == "model.onnx"
    assert facts["caches"][0]["shape"][0::2] == ["batch", "cache_length"]


def test_an_emitted_folder_is_replaced(folder: Path, emitted: Path) -> None:
    before = (emitted / "model.onnx").read_bytes()
    options = ("--emit", "onnx", "--flavor", "onnxruntime", "--max-model-len", 64)
    result = run("compile", folder, *options, "-o", emitted)
    assert result.exit_code == 0, result.stderr
    assert "flavor onnxruntime" in result.stdout
    assert (emitted / "model.onnx").read_bytes() != before


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--emit", "tensorrt", "--flavor", "standard"], ["option --flavor", "--emit onnx"]),
        (["--emit", "tensorrt", "--backend", "triton"], ["option --backend", "Leave it out"]),
        (["--emit", "tensorrt", "--target", "h7"], ["one of", "h100"]),
        (["--emit", "onnx", "--strict"], ["option --strict", "Leave --strict out"]),
        (["--emit", "openvino"], ["onnx, tensorrt", "'openvino'"]),
        (["--emit", "onnx", "--flavor", "x"], ["standard, onnxruntime", "'x'"]),
        (["--flavor", "standard"], ["--emit onnx", "no --emit"]),
        (["--emit", "onnx", "--backend", "triton"], ["option --backend", "Leave it out"]),
        (["--emit", "onnx", "--kv-cache", "paged"], ["option --kv-cache", "paged"]),
        (["--emit", "onnx", "--dtype", "float64"], ["option dtype", "float32, float16, bfloat16"]),
        (["--emit", "onnx", "--weights", "reference"], ["option --weights"]),
        (["--emit", "onnx", "--deterministic"], ["option --deterministic"]),
    ],
)
def test_options(gguf: Path, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    refused(run("compile", gguf, "-o", tmp_path / "e", *options), *parts)
    assert list(tmp_path.iterdir()) == []


def test_tensorrt(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavor, "find_spec", lambda name: None)
    place = tmp_path / "e"
    refused(run("compile", gguf, "--emit", "tensorrt", "-o", place), "pip install tilewright")
    asked: dict[str, object] = {}

    def export(model: object, path: Path, **options: object) -> EmittedEngine:
        asked.update(options)
        kernels, notes = {"_gemv_mha_v1": 2}, ("a note",)
        return EmittedEngine(path, "rtx 1.7", ("sm_89",), 9, 7, 0.5, True, kernels, ("p",), notes)

    monkeypatch.setattr(emit_tensorrt, "export_tensorrt", export)
    options = ("--emit", "tensorrt", "--strict", "--target", "l4", "--max-batch-size", 2)
    result = run("compile", gguf, *options, "-o", place)
    assert "attention fused" in result.stdout and "a note" in result.stderr + result.stdout
    assert asked["targets"] == "l4" and asked["strict"] and asked["max_batch_size"] == 2
    facts = json.loads(run("compile", gguf, *options, "-o", place, "--json").stdout)
    assert facts["emitted"] == str(place) and facts["kernels"] == {"_gemv_mha_v1": 2}


def test_places(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").touch()
    for place, found in (("full", "other files"), ("full/other", "a file"), ("no/e", "no folder")):
        refused(run("compile", gguf, "--emit", "onnx", "-o", tmp_path / place), found)
    refused(run("compile", tmp_path / "no", "--emit", "onnx", "-o", tmp_path / "e"), "no")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "other"]

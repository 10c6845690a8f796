"""Bad input: one clear message in four lines, the exit code, nothing half-written."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace

import pytest

from cli_running import COMPILE, refused, run, spawn
from tiny_gguf import write_tiny_gguf


@pytest.mark.quick
def test_a_missing_file(tmp_path):
    refused(run("compile", tmp_path / "no.gguf", "-o", tmp_path / "e"), "no.gguf", "nothing there")
    refused(run("generate", tmp_path / "no.gguf", "hello"), "no.gguf", "nothing there")
    refused(run("verify", tmp_path / "no"), "tilewright compile MODEL -o DIR")
    refused(run("bench", "startup", tmp_path / "no"), "nothing there")
    assert not (tmp_path / "e").exists()


@pytest.mark.quick
def test_a_truncated_gguf(gguf, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[: gguf.stat().st_size // 2])
    refused(run("compile", cut, "-o", tmp_path / "e", *COMPILE), "cut.gguf")
    assert not (tmp_path / "e").exists()


def test_a_truncated_safetensors(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(run("compile", copy, "-o", tmp_path / "e", *COMPILE), "model.safetensors")
    assert not (tmp_path / "e").exists()


def test_a_folder_without_config(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "config.json").unlink()
    refused(run("compile", copy, "-o", tmp_path / "e", *COMPILE), "config.json")


def test_an_unknown_architecture(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "nonesuch", "architectures": ["NoneSuchForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(config))
    refused(run("compile", copy, "-o", tmp_path / "e", *COMPILE), "nonesuch")
    path = tmp_path / "other.gguf"
    write_tiny_gguf(path)
    path.write_bytes(path.read_bytes().replace(b"llama", b"nosch"))
    refused(run("compile", path, "-o", tmp_path / "e", *COMPILE), "nosch")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [
        ("--target", "h1000", "cpu, a100, a10, rtx3090, l4, rtx4090, h100, h200, rtx5090, b200"),
        ("--backend", "cuda", "auto, eager, onnxruntime, tensorrt, triton"),
        ("--kv-cache", "pages", "auto, paged, static"),
        ("--dtype", "float31", "auto, float32, bfloat16, float16"),
        ("--verify", "some", "off, structure, sample, full"),
        ("--max-batch-size", "0", "1 or more"),
        ("--max-model-len", "-3", "1 or more"),
    ],
)
def test_an_unknown_value_lists_the_valid_ones(gguf, tmp_path, monkeypatch, option, value, valid):
    monkeypatch.delenv("TILEWRIGHT_VERIFY", raising=False)
    result = run("compile", gguf, "-o", tmp_path / "e", option, value)
    for name in valid.split(", "):
        assert name in result.stderr, result.stderr
    refused(result)


@pytest.mark.quick
def test_an_unknown_option_names_the_near_one(gguf, tmp_path):
    result = run("compile", gguf, "--outptu", tmp_path / "e")
    assert result.exit_code == 2 and "--output" in result.stderr
    assert run("comple").exit_code == 2
    assert run("generate").exit_code == 2


@pytest.mark.quick
def test_a_target_without_a_backend(gguf, tmp_path):
    args = ("--target", "h100", "--backend", "onnxruntime")
    refused(run("compile", gguf, "-o", tmp_path / "e", *args), "h100", "cpu")


def test_a_context_longer_than_the_model(gguf, tmp_path):
    args = ("compile", gguf, "-o", tmp_path / "e", "--backend", "eager", "--max-model-len", 9999)
    refused(run(*args), "256")


@pytest.mark.quick
def test_an_output_that_cannot_be(gguf, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(run("compile", gguf, "-o", tmp_path / "file", *COMPILE), "a file")
    refused(run("compile", gguf, "-o", tmp_path / "no" / "e", *COMPILE), "no folder")
    refused(run("compile", gguf, "-o", tmp_path, *COMPILE), "other files")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(engine, prompt):
    refused(run("generate", engine, prompt), "empty prompt")
    refused(run("generate", engine, "-", input=prompt), "empty prompt")


def test_a_prompt_longer_than_the_context(engine):
    refused(run("generate", engine, "fox " * 300), "at most 63 tokens")


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--max-new-tokens", 0, "max_new_tokens"),
        ("--temperature", -1, "temperature"),
        ("--top-p", 2, "top_p"),
        ("-n", 0, "SamplingParams.n"),
    ],
)
@pytest.mark.quick
def test_sampling_options_out_of_range(gguf, option, value, field):
    refused(run("generate", gguf, "hello", option, value), field)


def test_options_that_do_not_go_together(engine):
    refused(run("generate", engine, "hello", "--backend", "eager"), "compiled already")
    refused(run("generate", engine, "hi", "--no-chat", "--system", "be brief"), "--system")
    refused(run("inspect", engine, "--pass", "nonesuch"), "000-captured")
    refused(run("bench", "latency", engine, "--compare", "llamacpp"), "eager")
    refused(run("bench", "latency", engine, "--prompt-tokens", 64), "64")
    refused(run("bench", "latency", engine, "--new-tokens", 1), "--new-tokens")


@pytest.fixture
def copy(engine, tmp_path):
    """An engine that a test may damage."""
    shutil.copytree(engine, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("verb", [("verify",), ("generate", "hello")])
@pytest.mark.parametrize(
    "name", ["program.json", "report.json", "tokenizer.json", "weights/00000.safetensors"]
)
def test_a_tampered_file(copy, verb, name):
    raw = bytearray((copy / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / name).write_bytes(raw)
    refused(run(verb[0], copy, *verb[1:]), name, "sha256")


def test_a_tampered_manifest(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"eager"', '"onnxruntime"'))
    refused(run("verify", copy), "manifest")


def test_an_engine_of_another_format(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 99'))
    refused(run("generate", copy, "hello"), "99")


def test_an_engine_for_another_device(engine, tmp_path):
    from tilewright.runtime.folder import load_image, save_engine

    save_engine(replace(load_image(engine), target="h100"), tmp_path / "gpu")
    for verb in (("verify",), ("generate", "hello")):
        refused(run(verb[0], tmp_path / "gpu", *verb[1:]), "sm_90", "cpu")


def test_a_reference_that_is_gone(engine, tmp_path):
    from tilewright.runtime.folder import load_image, save_engine

    image = load_image(engine)
    report = {**image.report, "model": {"name": str(tmp_path / "gone.gguf"), "kind": "gguf"}}
    save_engine(replace(image, report=report), tmp_path / "e")
    refused(run("bench", "latency", tmp_path / "e", "--compare", "eager"), "--reference")


@pytest.mark.quick
def test_an_unknown_switch(gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_FAST", "1")
    refused(run("compile", gguf, "-o", tmp_path / "e"), "TILEWRIGHT_FAST", "TILEWRIGHT_DEBUG")


@pytest.mark.quick
def test_an_unexpected_exception_is_one_line(monkeypatch, gguf, tmp_path):
    from tilewright.compiler import api

    def broken(*_: object) -> None:
        raise KeyError("nobody expects this")

    monkeypatch.setattr(api, "compile_image", broken)
    result = run("compile", gguf, "-o", tmp_path / "e")
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert "KeyError" in result.stderr and "TILEWRIGHT_DEBUG=1" in result.stderr
    monkeypatch.setenv("TILEWRIGHT_DEBUG", "1")
    assert "Traceback" in run("compile", gguf, "-o", tmp_path / "e").stderr


def test_ctrl_c_in_the_middle_of_a_compile(gguf, tmp_path, monkeypatch):
    output = tmp_path / "place" / "engine"
    output.parent.mkdir()
    # Graphs of all passes are more than a pipe holds: the compile waits for us to read, however
    # late the signal comes.
    monkeypatch.setenv("TILEWRIGHT_DEBUG", "5")
    process = spawn("compile", gguf, "-o", output, *COMPILE)
    assert any(line.startswith("pass ") for line in process.stderr)  # the first pass is through
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr and "Traceback" not in stderr
    assert list(output.parent.iterdir()) == []
    assert run("compile", gguf, "-o", output, *COMPILE).exit_code == 0


def test_ctrl_c_while_saving_keeps_the_old_engine(gguf, engine, tmp_path, monkeypatch):
    from tilewright.runtime import folder as folders

    shutil.copytree(engine, tmp_path / "e")
    before = (tmp_path / "e" / "manifest.json").read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "_write_weights", interrupted)
    result = run("compile", gguf, "-o", tmp_path / "e", *COMPILE)
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    assert (tmp_path / "e" / "manifest.json").read_bytes() == before


def test_a_full_disk_keeps_the_old_engine(gguf, engine, tmp_path, monkeypatch):
    from tilewright.runtime import folder as folders

    shutil.copytree(engine, tmp_path / "e")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "_write_weights", full)
    refused(run("compile", gguf, "-o", tmp_path / "e", *COMPILE), "No space left")
    monkeypatch.undo()
    assert run("verify", tmp_path / "e").exit_code == 0

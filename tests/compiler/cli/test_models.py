"""``tilewright models``, and names where the verbs take a model."""

from __future__ import annotations

import json
import shutil

import pytest

from cli_running import refused, run
from tilewright.formats.gguf import GGUFCheckpoint
from tilewright.formats.gguf_tokenizer import read_gguf_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))


def data(*args: object):
    result = run("models", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_from_add_to_remove(gguf, folder, tmp_path) -> None:
    added = data("add", gguf, "--system", "Be brief.", "--parameter", "temperature=0.5")
    assert added["name"] == "tiny:latest" and added["size"] == gguf.stat().st_size
    assert added["parameters"] == {"temperature": 0.5} and added["system"] == "Be brief."
    options = ("--template-option", "enable_thinking=false", "--parameter", "stop=3")
    other = data("add", folder, "--name", "qwen:tiny", *options)
    assert other["template_options"] == {"enable_thinking": False}
    assert other["parameters"] == {"stop": ["3"]}
    assert run("models", "copy", "tiny", "again").exit_code == 0
    names = [entry["name"] for entry in data("list")]
    assert names == ["again:latest", "qwen:tiny", "tiny:latest"]
    assert data("show", "again", "--verify")["damage"] is None
    assert "Be brief." in run("models", "show", "tiny").stdout
    assert "qwen:tiny" in run("models", "list").stdout
    assert data("remove", "tiny")["bytes"] == 0
    assert data("remove", "again")["bytes"] == gguf.stat().st_size
    assert data("prune") == {"bytes": 0} and gguf.exists()


def test_damage_is_a_finding(gguf, tmp_path) -> None:
    own = shutil.copy(gguf, tmp_path / "own.gguf")
    data("add", own)
    with own.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    refused(run("models", "show", "own", "--verify"), "sha256", "models add PATH", code=1)
    refused(run("generate", "own", "hello"), "sha256")
    (manifest,) = (tmp_path / "cache" / "models" / "manifests").iterdir()
    manifest.write_text("{}")
    listed = run("models", "list")
    assert listed.exit_code == 1 and "damaged" in listed.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--name", "../x"), ("model name", "../x")),
        (("--parameter", "heat=1"), ("heat", "temperature")),
        (("--parameter", "temperature"), ("option --parameter", "NAME=VALUE")),
        (("--quantize", "int9"), ("int9", "int8-weight")),
    ],
)
def test_what_cannot_be_added_is_said(gguf, arguments, parts) -> None:
    refused(run("models", "add", gguf, *arguments), *parts)
    assert data("list") == []


def test_a_damaged_file_is_not_added(tmp_path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    refused(run("models", "add", tmp_path / "cut.gguf"), "cut.gguf")
    assert data("list") == []


def test_a_name_stands_where_a_model_does(gguf, tmp_path, monkeypatch) -> None:
    preset = ("--parameter", "num_predict=3", "--parameter", "num_ctx=64")
    data("add", gguf, "--system", "a fox", *preset)
    chosen = ("--backend", "eager", "--json")
    result = run("generate", "tiny", "hello", *chosen)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    tokenizer = read_gguf_tokenizer(GGUFCheckpoint(gguf))
    messages = [{"role": "system", "content": "a fox"}, {"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages)
    assert found["prompt_token_ids"] == tokenizer.encode(text, add_special_tokens=False)
    assert len(found["completions"][0]["token_ids"]) == 3
    # An option goes before the preset, and nothing is compiled twice.
    with monkeypatch.context() as patched:
        patched.setattr("tilewright.compiler.api.compile_image", None)
        other = run("generate", "tiny", "hello", "--max-new-tokens", 2, "--system", "", *chosen)
    assert other.exit_code == 0, other.output
    assert len(json.loads(other.stdout)["completions"][0]["token_ids"]) == 2
    assert len(json.loads(other.stdout)["prompt_token_ids"]) < len(found["prompt_token_ids"])
    refused(run("generate", "tony", "hello"), "registered: tiny", "Did you mean 'tiny'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a path goes first
    refused(run("generate", "tiny", "hello", "--backend", "eager"), "config.json")

"""What the tests of the command line share: tiny checkpoints and an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_running import COMPILE, run
from tiny_gguf import tiny_bpe, tiny_hf_model, write_tiny_gguf


@pytest.fixture(scope="session")
def gguf(tmp_path_factory) -> Path:
    """A tiny Llama with tokenizer and chat template, as GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny Qwen2 with tokenizer, as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("folder") / "tiny"
    tiny_hf_model("qwen2").save_pretrained(path)
    tiny_bpe().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def engine(tmp_path_factory, gguf) -> Path:
    """The GGUF, compiled by the command line."""
    path = tmp_path_factory.mktemp("engine") / "tiny-engine"
    result = run("compile", gguf, "-o", path, *COMPILE)
    assert result.exit_code == 0, result.stderr
    return path

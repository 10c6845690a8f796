"""Engines that several files of end-to-end tests share: compiled once a session, never changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tilewright as tw
from e2e.models import MLP, moved_off_init
from tiny_gguf import write_tiny_gguf

CHAT = "the quick brown fox"


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer llama with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture(scope="session", params=["eager", "onnxruntime"])
def lm_engine(request: pytest.FixtureRequest, tiny_gguf: Path) -> tw.Engine:
    """That llama on each backend."""
    return tw.compile(tiny_gguf, backend=request.param, verify="structure")


@pytest.fixture(scope="session")
def saved_lm(lm_engine: tw.Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its engine folder, to be copied before it is damaged."""
    path = tmp_path_factory.mktemp("saved") / "lm"
    lm_engine.save(path)
    return path


@pytest.fixture(scope="session")
def mlp_engine() -> tw.Engine:
    """A plain module with a dynamic batch, on eager."""
    torch.manual_seed(0)
    module = moved_off_init(MLP())
    batch = torch.export.Dim("batch", min=1, max=64)
    return tw.compile(module, (torch.randn(4, 20),), dynamic_shapes=({0: batch},), backend="eager")

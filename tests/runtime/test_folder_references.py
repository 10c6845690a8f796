"""Engines that refer to a checkpoint or to seeds instead of holding weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.errors import CheckpointError, EngineError, UsageError
from tilewright.runtime.folder import load_image
from tiny_gguf import write_tiny_gguf
from tiny_models import tiny_model

IDS = torch.tensor([[3, 9, 27, 81, 5]])
OPTIONS = {"backend": "eager", "verify": "off", "max_model_len": 32}
# Loads an engine where nothing but the runtime can be imported, and prints logits.
ALONE = """
import sys
for name in ("transformers", "tilewright.compiler", "tilewright.passes"):
    sys.modules[name] = None
import torch, tilewright as tw
print(tw.load(sys.argv[1])(torch.tensor([[3, 9, 27, 81, 5]])).double().sum().item().hex())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("llama_tied").save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def engine(model: Path) -> tw.Engine:
    return tw.compile(model, **OPTIONS)


@pytest.fixture(scope="module")
def saved(engine: tw.Engine, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "engine"
    engine.save(path, weights="reference")
    return path


@pytest.fixture(scope="module")
def config_only(model: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    shutil.copy(model / "config.json", folder)
    return folder


def test_a_sharded_folder_is_read_where_it_is(engine, saved: Path, model: Path) -> None:
    names = {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}
    assert "weights.json" in names
    assert not any(name.startswith("weights/") for name in names)
    shards = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    assert sum((saved / name).stat().st_size for name in names if "tensors" in name) < shards / 100
    data = json.loads((saved / "weights.json").read_text())
    assert data["checkpoint"]["path"] == str(model)
    loaded = tw.load(saved)
    assert torch.equal(loaded(IDS), engine(IDS))
    # The norms, embedding and projections of all shards, once.
    assert loaded.weight_load.bytes_read == sum(
        parameter.nbytes for parameter in tiny_model("llama_tied").parameters()
    )


def test_it_loads_with_nothing_but_the_runtime(engine, saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, saved], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == engine(IDS).double().sum().item().hex()


def test_a_loaded_engine_can_be_saved_either_way(engine, saved: Path, tmp_path: Path) -> None:
    loaded = tw.load(saved)
    loaded.save(tmp_path / "again", weights="reference")
    assert (tmp_path / "again" / "weights.json").read_text() == (saved / "weights.json").read_text()
    loaded.save(tmp_path / "whole")
    whole = tw.load(tmp_path / "whole")
    assert torch.equal(whole(IDS), engine(IDS))
    with pytest.raises(UsageError, match="another engine"):
        whole.save(tmp_path / "third", weights="reference")
    assert not (tmp_path / "third").exists()


def test_a_moved_checkpoint(engine, model: Path, saved: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(model, tmp_path / "moved")
    assert torch.equal(tw.load(saved, checkpoint=moved)(IDS), engine(IDS))
    with pytest.raises(EngineError, match=r"nothing there.*checkpoint=PATH"):
        tw.load(saved, checkpoint=tmp_path / "absent")
    shard = max(moved.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(EngineError, match=rf"{shard.name}: expected sha256"):
        tw.load(saved, checkpoint=moved)


def test_another_checkpoint_of_the_same_shapes_is_refused(saved: Path, tmp_path: Path) -> None:
    other = tiny_model("llama_tied")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    other.save_pretrained(tmp_path, max_shard_size="60KB")
    with pytest.raises(EngineError, match="as when the engine was saved"):
        tw.load(saved, checkpoint=tmp_path)


@pytest.mark.parametrize("name", ["weights.json", "held.safetensors"])
def test_tampering(saved: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(saved, tmp_path / "engine")
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content.replace(b'"', b"'", 1))
    with pytest.raises(EngineError, match=rf"{name}: expected sha256"):
        tw.load(copy)
    (copy / name).unlink()
    with pytest.raises(EngineError, match=rf"{name}: expected a file of the engine"):
        tw.load(copy)


def test_weights_in_memory_can_only_be_embedded(tmp_path: Path) -> None:
    engine = tw.compile(nn.Linear(3, 2), (torch.zeros(1, 3),), backend="eager")
    with pytest.raises(UsageError, match=r'a tensor in memory.*weights="embed"'):
        engine.save(tmp_path / "engine", weights="reference")
    with pytest.raises(UsageError, match="embed, reference"):
        engine.save(tmp_path / "engine", weights="referenced")
    assert not (tmp_path / "engine").exists()
    engine.save(tmp_path / "engine")
    with pytest.raises(UsageError, match="holds its weights"):
        tw.load(tmp_path / "engine", checkpoint=tmp_path)


def test_a_gguf_file(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    engine = tw.compile(tmp_path / "tiny.gguf", **OPTIONS)
    engine.save(tmp_path / "engine", weights="reference")
    data = json.loads((tmp_path / "engine" / "weights.json").read_text())
    assert data["checkpoint"]["kind"] == "gguf"
    moved = (tmp_path / "tiny.gguf").rename(tmp_path / "renamed")
    found = load_image(tmp_path / "engine", moved).weights
    assert set(found) == set(engine.image.weights)
    for name, weight in engine.image.weights.items():
        assert torch.equal(found[name].load(), weight.load()), name


def test_random_weights_need_no_file(config_only: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="random_weights=SEED"):
        tw.compile(config_only, **OPTIONS)
    engine = tw.compile(config_only, random_weights=7, **OPTIONS)
    assert engine.report()["model"]["random_weights"] == 7
    engine.save(tmp_path / "engine", weights="reference")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "engine").iterdir() if p.is_file()}
    assert sizes["weights.json"] < 10_000
    loaded = tw.load(tmp_path / "engine")
    assert torch.equal(loaded(IDS), engine(IDS))
    assert loaded.weight_load.bytes_read == 0
    with pytest.raises(UsageError, match="made from seeds"):
        tw.load(tmp_path / "engine", checkpoint=config_only)


def test_the_seed_decides(config_only: Path) -> None:
    one, same, other = (
        tw.compile(config_only, random_weights=seed, dtype="bfloat16", **OPTIONS)
        for seed in (7, 7, 8)
    )
    assert torch.equal(one(IDS), same(IDS))
    assert not torch.equal(one(IDS), other(IDS))
    assert torch.isfinite(one(IDS)).all()
    norms = [w for name, w in one.image.weights.items() if "norm" in name]
    assert norms and all(torch.equal(w.load(), torch.ones(64).bfloat16()) for w in norms)


@pytest.mark.parametrize("seed", [-1, 2**63, "7", True])
def test_wrong_seeds(config_only: Path, seed: object) -> None:
    with pytest.raises(UsageError, match="random_weights"):
        tw.compile(config_only, random_weights=seed, **OPTIONS)


def test_random_weights_of_a_module() -> None:
    with pytest.raises(UsageError, match="random_weights"):
        tw.compile(nn.Linear(3, 2), (torch.zeros(1, 3),), random_weights=1)

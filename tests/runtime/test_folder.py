"""What the engine folder keeps: shards, tied weights, engines without weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tilewright as tw
from e2e.models import GPT, moved_off_init
from tilewright.errors import GraphError
from tilewright.runtime import folder as folder_module
from tilewright.runtime.folder import save_engine


def roundtrip(module: nn.Module, inputs: tuple, path: Path) -> None:
    engine = tw.compile(module, inputs, backend="eager", kv_cache=None)
    engine.save(path)
    with torch.no_grad():
        expected = module(*inputs)
    torch.testing.assert_close(tw.load(path)(*inputs), expected, atol=1e-5, rtol=1e-5)


def test_weights_are_cut_into_shards(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "SHARD_BYTES", 20_000)
    roundtrip(moved_off_init(GPT()), (torch.zeros(1, 8).long(),), tmp_path / "engine")
    shards = sorted((tmp_path / "engine" / "weights").iterdir())
    assert len(shards) > 3
    largest = max(tensor.nbytes for tensor in moved_off_init(GPT()).parameters())
    assert all(shard.stat().st_size < 20_000 + largest + 4096 for shard in shards)


def test_an_engine_without_weights(tmp_path) -> None:
    roundtrip(nn.SiLU(), (torch.randn(3, 4),), tmp_path / "engine")


def test_tied_weights(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.embed(ids)
            return self.head(x), x

    roundtrip(Tied(), (torch.arange(5)[None],), tmp_path / "engine")


def test_other_element_types_of_inputs_and_results(tmp_path) -> None:
    class Mixed(nn.Module):
        def forward(self, x, flags, *, scale):
            return {"a": [x * scale, (flags.logical_not(),)], "b": x.long(), "c": None, "d": 3}

    module = Mixed()
    x, flags = torch.randn(3), torch.tensor([True, False])
    inputs = {"x": x, "flags": flags, "scale": torch.tensor(2.0, dtype=torch.float64)}
    engine = tw.compile(module, inputs, backend="eager")
    engine.save(tmp_path / "engine")
    found, expected = tw.load(tmp_path / "engine")(**inputs), module(**inputs)
    torch.testing.assert_close(found["a"], expected["a"])
    assert torch.equal(found["b"], expected["b"])
    assert found["c"] is None
    assert found["d"] == 3


def test_the_manifest_lists_every_file_with_its_hash(tmp_path) -> None:
    path = tmp_path / "new" / "place" / "engine"
    roundtrip(nn.Linear(3, 2), (torch.randn(1, 3),), path)
    manifest = json.loads((path / "manifest.json").read_text())
    there = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == there - {"manifest.json"}
    assert manifest["format"] == 2
    assert manifest["target"] == str(tw.Target.detect())
    for name in ("program.json", "report.json", "graphs/000-captured.txt"):
        assert name in there


def test_another_torch_is_said_once_and_not_refused(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tw.compile(nn.Linear(3, 2), (torch.zeros(1, 3),), backend="eager")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "2.99.0")
        engine.save(tmp_path / "engine")
    with pytest.warns(UserWarning, match=r"compiled with torch 2\.99\.0"):
        tw.load(tmp_path / "engine")


def test_an_aten_call_that_this_torch_lacks_is_refused_at_load(tmp_path) -> None:
    class Sorts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort(-1).values

    engine = tw.compile(Sorts(), (torch.randn(2, 3),), backend="eager")
    assert engine.report()["aten"] == ["aten.sort.default"]
    calls = [
        replace(call, attrs={**call.attrs, "target": "aten.sorted_by_magic.default"})
        if call.kernel == "eager/aten"
        else call
        for call in engine.image.program.calls
    ]
    program = replace(engine.image.program, calls=tuple(calls))
    save_engine(replace(engine.image, program=program), tmp_path / "engine")
    with pytest.raises(GraphError, match="sorted_by_magic"):
        tw.load(tmp_path / "engine")

"""`export_tensorrt`: a folder with an engine, and every refusal before one is written."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from torch import nn

import tilewright as tw
from tensorrt_fakes import fake_tensorrt
from tilewright.codegen.tensorrt import builder, flavor, regions
from tilewright.codegen.tensorrt.builder import Built
from tilewright.codegen.tensorrt.flavor import Flavor
from tilewright.compiler import emit_source
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.errors import UnsupportedError, UsageError, VerificationError
from tiny_models import tiny_model

ROOM = 32
FAKE = Flavor("tensorrt_rtx", fake_tensorrt(), (75, 80, 89, 120))


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama").bfloat16()


@pytest.fixture(autouse=True)
def _captured_once(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """That model is captured once for all tests of it."""

    def capture(module: nn.Module) -> object:
        return _captured(module) if module is llama else capture_causal_lm(module)

    monkeypatch.setattr(emit_source, "capture_causal_lm", capture)


@cache
def _captured(module: nn.Module) -> object:
    return capture_causal_lm(module)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A TensorRT whose engines are what was asked for."""
    found: dict[str, object] = {}

    def build(network, flavor, archs, profiles, file, strict):
        found.update(network=network, archs=archs, profiles=profiles, strict=strict)
        file.write(b"engine")
        return Built(tuple(archs), 6, 0.1, True, ())

    monkeypatch.setattr(flavor, "find_flavor", lambda: FAKE)
    monkeypatch.setattr(builder, "build_engine", build)
    return found


def test_what_is_written(llama, tmp_path: Path, asked) -> None:
    found = tw.export_tensorrt(
        llama, tmp_path / "e", targets="l4,sm_120", max_model_len=ROOM, max_batch_size=3
    )
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "generation.json", "model.engine", "network.txt",
    ]  # fmt: skip
    assert asked["archs"] == (89, 120) and found.targets == ("sm_89", "sm_120")
    assert str(asked["network"]) in (tmp_path / "e" / "network.txt").read_text()
    facts = json.loads((tmp_path / "e" / "generation.json").read_text())
    assert facts["profiles"][1] == {
        "name": "decode", "batch": [1, 3, 3], "length": [1, 1, 1], "rows": [1, 3, 3],
    }  # fmt: skip
    assert facts["caches"][0]["shape"] == ["batch", 2, ROOM, 16]
    assert facts["caches"][0]["dtype"] == "bfloat16"
    assert any(layer.output.startswith("layers.1/") for layer in asked["network"].layers)


@pytest.mark.parametrize(
    ("options", "archs", "dtype"),
    [
        ({}, (80, 89, 120), "bf16"),
        pytest.param(
            {"targets": ["sm_75", "a100"]}, (75, 80), "f16", marks=pytest.mark.nightly
        ),  # captured a second time
        ({"quantize": tw.QuantConfig("fp8-weight", method="rtn")}, (89, 120), "bf16"),
    ],
)
def test_targets_and_types(llama, tmp_path: Path, asked, options, archs, dtype: str) -> None:
    tw.export_tensorrt(llama, tmp_path / "e", max_model_len=ROOM, **options)
    assert asked["archs"] == archs
    assert str(asked["network"].inputs[-1].dtype) == dtype


def refuse(error: type[Exception], match: str, model: object, path: Path, **options) -> None:
    """Nothing is written, and nothing is left behind."""
    with pytest.raises(error, match=match):
        tw.export_tensorrt(model, path / "e", max_model_len=ROOM, **options)
    assert list(path.iterdir()) == []


def test_tensorrt_is_missing(llama, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(flavor, "find_spec", lambda name: None)
    refuse(UnsupportedError, r"pip install tilewright\[tensorrt\]", llama, tmp_path)


@pytest.mark.usefixtures("asked")
def test_targets_that_there_are_not(llama, tmp_path: Path) -> None:
    listed = "targets among sm_75, sm_80, sm_89, sm_120, found sm_90"
    refuse(UnsupportedError, listed, llama, tmp_path, targets="h100")
    refuse(UsageError, "NVIDIA GPUs", llama, tmp_path, targets="cpu")
    refuse(UsageError, "one of .*h100", llama, tmp_path, targets="l4,nothing")


@pytest.mark.usefixtures("asked")
def test_schemes_and_models_that_it_has_not(llama, tmp_path: Path) -> None:
    config = tw.QuantConfig("fp8", method="rtn")
    match = r"quantize='fp8' for TensorRT: op quantize_rows.*Quantize by fp8-tensor"
    refuse(UnsupportedError, match, llama, tmp_path, quantize=config)
    refuse(UnsupportedError, "found a plain module", nn.Linear(2, 2), tmp_path)


def test_a_wrong_network_is_not_built(llama, tmp_path: Path, asked, monkeypatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_VERIFY", "sample")
    monkeypatch.setitem(regions.CONVERTERS, "gated", lambda w, node: w.value(node.operands[0]))
    refuse(VerificationError, "the network for TensorRT", llama, tmp_path, targets="l4")
    assert not asked


def test_a_failing_build_keeps_the_old_folder(llama, tmp_path: Path, asked, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left")

    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "generation.json").write_text("{}")
    monkeypatch.setattr(builder, "build_engine", full)
    with pytest.raises(OSError, match="no space"):
        tw.export_tensorrt(llama, tmp_path / "e", max_model_len=ROOM)
    assert [path.name for path in tmp_path.rglob("*")] == ["e", "generation.json"]

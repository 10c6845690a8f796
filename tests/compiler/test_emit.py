"""Emitted folders in stock onnxruntime: Hugging Face's own logits and tokens, and every refusal."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
from torch import nn

import tilewright as tw
from emitted_running import ROOM, agrees_with_hugging_face
from tilewright.codegen.onnx import standard
from tilewright.compiler import emit_source
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.errors import UnsupportedError, UsageError, VerificationError
from tiny_models import tiny_model


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_the_onnxruntime_flavor_agrees_with_hugging_face(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    tw.export_onnx(model, tmp_path / "e", flavor="onnxruntime", max_model_len=ROOM)
    agrees_with_hugging_face(tmp_path / "e", model)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _captured_once(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """That model is captured once for all tests of it."""

    def capture(module: nn.Module) -> object:
        return _llama_captured(module) if module is llama else capture_causal_lm(module)

    monkeypatch.setattr(emit_source, "capture_causal_lm", capture)


@cache
def _llama_captured(module: nn.Module) -> object:
    return capture_causal_lm(module)


@pytest.fixture
def _verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test says of checks holds, not what the tests ask of every compile."""
    monkeypatch.delenv("TILEWRIGHT_VERIFY")


@pytest.mark.usefixtures("_verified")
def test_numbers_are_compared_and_layers_kept(llama, tmp_path: Path) -> None:
    phases: list[str] = []
    found = tw.export_onnx(
        llama, tmp_path / "e", verify="full", progress=lambda name, share: phases.append(name)
    )
    assert found.largest_error is not None and found.largest_error < 1e-5 and "check" in phases
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [
        "generation.json", "model.onnx", "model.onnx.data",
    ]  # fmt: skip
    proto = onnx.load(tmp_path / "e" / "model.onnx", load_external_data=False)
    layers = {
        prop.value
        for node in proto.graph.node
        for prop in node.metadata_props
        if prop.key == "tilewright.layer"
    }
    assert layers == {"layers.0", "layers.1"}
    assert proto.opset_import[0].version == 24


@pytest.mark.usefixtures("_verified")
@pytest.mark.parametrize("flavor", ["standard", "onnxruntime"])
@pytest.mark.parametrize(
    ("config", "op"),
    [
        (tw.QuantConfig("int8", method="rtn"), {"standard": "MatMulInteger"}),
        (tw.QuantConfig("int4", group=32), {"standard": "DequantizeLinear"}),
    ],
)
def test_quantized(llama, tmp_path: Path, flavor: str, config, op: dict[str, str]) -> None:
    found = tw.export_onnx(
        llama, tmp_path / "e", flavor=flavor, quantize=config, max_model_len=ROOM, verify="full"
    )
    assert found.largest_error is not None
    plain = sum(p.nbytes for n, p in llama.named_parameters() if "proj" in n)
    codes = plain / 4 if config.scheme == "int8" else plain / 7
    rest = sum(p.nbytes for n, p in llama.named_parameters() if "proj" not in n)
    assert found.weight_bytes < rest + 1.2 * codes + 10_000
    proto = onnx.load(tmp_path / "e" / "model.onnx", load_external_data=False)
    assert op.get(flavor, "MatMulNBits") in {node.op_type for node in proto.graph.node}


def refuse(error: type[Exception], match: str, model: object, path: Path, **options) -> None:
    """Nothing is written, and nothing is left behind."""
    with pytest.raises(error, match=match):
        tw.export_onnx(model, path / "e", max_model_len=ROOM, **options)
    assert list(path.iterdir()) == []


def test_what_is_no_causal_lm(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    refuse(UnsupportedError, "found a plain module", nn.Linear(2, 2), tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(vocab_size=8, intermediate_size=8, **sizes))
    refuse(UnsupportedError, "found a plain module", encoder, tmp_path)


def test_tokens_that_mix_elsewhere(tmp_path: Path) -> None:
    refuse(UnsupportedError, "Only a causal LM with a KV cache", tiny_model("lfm2"), tmp_path)


def test_options(llama, tmp_path: Path) -> None:
    refuse(UsageError, "standard, onnxruntime", llama, tmp_path, flavor="openvino")
    refuse(UsageError, "a checkpoint in codes", llama, tmp_path, quantize="stored")
    match = "quantize='fp8-weight' in flavor 'standard': op linear in layers.0"
    options = {"quantize": tw.QuantConfig("fp8-weight", method="rtn"), "verify": "structure"}
    refuse(UnsupportedError, match, llama, tmp_path, **options)


def test_a_model_that_the_checker_refuses(llama, tmp_path: Path, monkeypatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise onnx.checker.ValidationError("no such thing\nat all")

    monkeypatch.setattr(onnx.checker, "check_model", refused)
    refuse(VerificationError, "found no such thing", llama, tmp_path)


@pytest.mark.usefixtures("_verified")
def test_a_model_that_computes_something_else(llama, tmp_path: Path, monkeypatch) -> None:
    table = dict(standard.STANDARD)
    table["add"] = lambda e, node, a, b: e.op("Sub", a, b)
    monkeypatch.setitem(standard.CONVERTERS_OF, "standard", table)
    refuse(VerificationError, "the emitted ONNX model", llama, tmp_path, verify="full")


def test_a_failure_keeps_the_old_folder(llama, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "e"
    folder.mkdir()
    (folder / "generation.json").write_text("{}")

    def full(*args: object, **options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(OSError, match="no space"):
        tw.export_onnx(llama, folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["e", "generation.json"]

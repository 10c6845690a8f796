"""Emitted folders in stock onnxruntime: Hugging Face's own logits and tokens, and every refusal."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import tilewright as tw
from emitted_running import ROOM, agrees_with_hugging_face, nearly_as_good_in_bfloat16
from tilewright.codegen.onnx import standard
from tilewright.compiler import emit, emit_source
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


def test_batch_length_and_cache_are_dynamic(llama, tmp_path: Path) -> None:
    """One session takes all sizes; the file says which are free, and the same names are one."""
    tw.export_onnx(llama, tmp_path / "e")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(tmp_path / "e" / "model.onnx", options)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch", "length"]
    assert shapes["logits_indices"] == ["batch", "rows"]
    assert shapes["past_key_values.1.value"] == ["batch", 2, "cache_length", 16]
    outputs = {value.name: value.shape for value in session.get_outputs()}
    assert outputs["logits"] == ["batch", "rows", 160]
    for batch, length, rows, room in ((1, 3, 3, 8), (3, 7, 1, 16), (2, 1, 1, 5)):
        ids = np.random.default_rng(length).integers(160, size=(batch, length))
        every = np.broadcast_to(np.arange(length), ids.shape)
        sizes = {"batch": batch, "cache_length": room}
        feeds = {
            name: np.zeros([sizes.get(size, size) for size in shape], np.float32)
            for name, shape in shapes.items()
            if name.startswith("past")
        }
        feeds |= {"input_ids": ids, "position_ids": every, "logits_indices": every[:, -rows:]}
        logits, *presents = session.run(None, feeds)
        with torch.no_grad():
            wanted = llama(torch.from_numpy(ids)).logits[:, -rows:].numpy()
        np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=0)
        assert {present.shape for present in presents} == {(batch, 2, room, 16)}


def test_what_a_viewer_shows(llama, tmp_path: Path) -> None:
    """Nodes by layer and op, weights by the checkpoint's names, the file by the model's."""
    tw.export_onnx(llama, tmp_path / "e", flavor="onnxruntime", max_model_len=ROOM)
    proto = onnx.load(tmp_path / "e" / "model.onnx", load_external_data=False)
    assert (proto.producer_name, proto.graph.name) == ("tilewright", "llamaforcausallm")
    told = {prop.key: prop.value for prop in proto.metadata_props}
    assert told == {"tilewright.version": tw.__version__, "tilewright.flavor": "onnxruntime"}
    names = [node.name for node in proto.graph.node]
    assert all(names) and len(set(names)) == len(names)
    (attention, _) = (n for n in proto.graph.node if n.op_type == "GroupQueryAttention")
    assert attention.name.startswith("layers.0/")
    assert {prop.value for prop in attention.metadata_props} == {"layers.0", "slot_attention"}
    held = {tensor.name for tensor in proto.graph.initializer}
    assert {"model.norm.weight", "model.layers.1.mlp.down_proj.weight"} <= held


@pytest.mark.usefixtures("_verified")
@pytest.mark.parametrize("flavor", ["standard", "onnxruntime"])
@pytest.mark.parametrize(
    ("config", "op"),
    [
        (tw.QuantConfig("int8", method="rtn"), {"standard": "MatMulInteger"}),
        (tw.QuantConfig("int4", group=32), {"standard": "DequantizeLinear"}),
        pytest.param(
            tw.QuantConfig("fp8", method="rtn"),
            dict.fromkeys(emit.FLAVORS, "QuantizeLinear"),
            marks=pytest.mark.nightly,  # test_float8.py has each product
        ),
    ],
    ids=["int8", "int4", "fp8"],
)
def test_quantized(llama, tmp_path: Path, flavor: str, config, op: dict[str, str]) -> None:
    found = tw.export_onnx(
        llama, tmp_path / "e", flavor=flavor, quantize=config, max_model_len=ROOM, verify="full"
    )
    assert found.largest_error is not None
    plain = sum(p.nbytes for n, p in llama.named_parameters() if "proj" in n)
    codes = plain / 7 if config.scheme == "int4" else plain / 4
    rest = sum(p.nbytes for n, p in llama.named_parameters() if "proj" not in n)
    assert found.weight_bytes < rest + 1.2 * codes + 10_000
    proto = onnx.load(tmp_path / "e" / "model.onnx", load_external_data=False)
    assert op.get(flavor, "MatMulNBits") in {node.op_type for node in proto.graph.node}


@pytest.mark.usefixtures("_verified")
@pytest.mark.parametrize(
    "flavor", [pytest.param("standard", marks=pytest.mark.nightly), "onnxruntime"]
)
def test_float16_runs(llama, tmp_path: Path, flavor: str) -> None:
    options = {"dtype": "float16", "flavor": flavor, "max_model_len": ROOM, "verify": "full"}
    found = tw.export_onnx(llama, tmp_path / "e", **options)
    assert found.largest_error is not None and not found.notes
    proto = onnx.load(tmp_path / "e" / "model.onnx", load_external_data=False)
    declared = {v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)}
    assert declared == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    attention = {"standard": "Attention", "onnxruntime": "GroupQueryAttention"}[flavor]
    assert attention in {node.op_type for node in proto.graph.node}


def test_bfloat16_is_checked_and_not_run(llama, tmp_path: Path) -> None:
    found = tw.export_onnx(llama, tmp_path / "e", dtype="bfloat16", max_model_len=ROOM)
    assert found.largest_error is None and found.notes == (emit.UNRUN,)
    nearly_as_good_in_bfloat16(tmp_path / "e", deepcopy(llama))


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
    refuse(UsageError, "auto, float32, float16, bfloat16", llama, tmp_path, dtype="float64")
    refuse(UsageError, "a checkpoint in codes", llama, tmp_path, quantize="stored")
    match = "quantize='int4' in flavor 'standard': op linear in layers.0.*64 columns end within"
    options = {"quantize": tw.QuantConfig("int4", method="rtn"), "verify": "structure"}
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

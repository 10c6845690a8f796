"""Every architecture emitted as ONNX, in stock onnxruntime: Hugging Face's logits and tokens.

For `make nightly`; every run has the named fifteen in `test_architectures.py`, and the onnxruntime
flavor in `compiler/test_emit.py`.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

import tilewright as tw
from emitted_running import ROOM, agrees_with_hugging_face, nearly_as_good_in_bfloat16
from prequantized import edit_config, edit_tensors, gptq_tensors, grid_of
from tilewright.compiler import emit, emit_source
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.errors import TilewrightError
from tiny_models import FAMILIES, RECURRENT, tiny_model

pytestmark = pytest.mark.nightly
# What no causal LM with a KV cache is, to the frontend or to the cache pass, and what they say.
REFUSED = {
    "phi3_longrope": "works along the token axis",
    "doge": "operands whose token axes do not meet",
    "jetmoe": "one that depends on values",
    "dbrx": "control flow that does not depend on the values",
    "llama4": "operands whose token axes do not meet",
}
EMITTED = [name for name in FAMILIES if name not in (*RECURRENT, *REFUSED)]


@pytest.mark.parametrize("family", EMITTED)
def test_both_flavors_agree_with_hugging_face(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    captured = capture_causal_lm(model)  # once for both
    monkeypatch.setattr(emit_source, "capture_causal_lm", lambda module: captured)
    for flavor in emit.FLAVORS:
        tw.export_onnx(model, tmp_path / flavor, flavor=flavor, max_model_len=ROOM)
        agrees_with_hugging_face(tmp_path / flavor, model)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "falcon_alibi", "mixtral"])
def test_sixteen_bits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILEWRIGHT_VERIFY")  # which says how much of any compile tests check
    model = tiny_model(family)
    common = {"max_model_len": ROOM, "verify": "full"}
    for flavor in emit.FLAVORS:
        found = tw.export_onnx(model, tmp_path / "e", flavor=flavor, dtype="float16", **common)
        assert found.largest_error is not None
    tw.export_onnx(model, tmp_path / "e", dtype="bfloat16", **common)
    nearly_as_good_in_bfloat16(tmp_path / "e", model)


def test_experts_in_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint whose experts are in 4 bits keeps them so, and has their numbers' logits."""
    monkeypatch.delenv("TILEWRIGHT_VERIFY")
    plain, coded = tmp_path / "plain", tmp_path / "coded"
    for folder in (plain, coded):
        tiny_model("mixtral").save_pretrained(folder)

    def decode(tensors: dict[str, torch.Tensor], codes: bool) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            grid = grid_of(tensors.pop(name), 4, 32, False)
            made = {name: grid.value.float()}
            if codes:
                made = {f"{name[:-7]}.{k}": v for k, v in gptq_tensors(grid, 4).items()}
            tensors |= {k: v.contiguous() for k, v in made.items()}

    edit_tensors(plain, lambda tensors: decode(tensors, False))
    edit_tensors(coded, lambda tensors: decode(tensors, True))
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    edit_config(coded, quantization_config=settings)
    options = {"flavor": "onnxruntime", "quantize": "stored", "max_model_len": ROOM}
    found = tw.export_onnx(coded, tmp_path / "e", verify="full", **options)
    assert found.largest_error is not None and not found.notes
    proto = onnx.load(tmp_path / "e" / "model.onnx", load_external_data=False)
    assert [node.op_type for node in proto.graph.node].count("QMoE") == 2
    options["flavor"] = "standard"  # which has no op for them
    (note,) = tw.export_onnx(coded, tmp_path / "s", **options).notes
    assert note.startswith("4 weights") and "experts" in note
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    agrees_with_hugging_face(tmp_path / "e", model)


@pytest.mark.parametrize(("family", "told"), REFUSED.items())
def test_what_is_refused_leaves_nothing(family: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(TilewrightError, match=told):
        tw.export_onnx(tiny_model(family), tmp_path / "e", max_model_len=ROOM)
    assert list(tmp_path.iterdir()) == []

"""Every architecture emitted as ONNX, in stock onnxruntime: Hugging Face's logits and tokens.

For `make nightly`; every run has the named fifteen in `test_architectures.py`, and the onnxruntime
flavor in `compiler/test_emit.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import tilewright as tw
from emitted_running import ROOM, agrees_with_hugging_face, nearly_as_good_in_bfloat16
from tilewright.compiler import emit
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
    monkeypatch.setattr(emit, "capture_causal_lm", lambda module: captured)
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


@pytest.mark.parametrize(("family", "told"), REFUSED.items())
def test_what_is_refused_leaves_nothing(family: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(TilewrightError, match=told):
        tw.export_onnx(tiny_model(family), tmp_path / "e", max_model_len=ROOM)
    assert list(tmp_path.iterdir()) == []

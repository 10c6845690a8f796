"""The eager backend on a GPU: the same Programs, the same tokens as Hugging Face in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tilewright as tw
from tiny_models import NAMED, PROMPTS, greedy, tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", NAMED)
def test_named_architectures_give_the_tokens_of_hugging_face(name: str) -> None:
    model = tiny_model(name)
    engine = tw.compile(model)
    assert not engine.target.is_cpu and engine.report()["aten"] == []
    params = tw.SamplingParams(max_new_tokens=32, ignore_eos=True)
    found = [c.token_ids for c in engine.generate(PROMPTS, params)]
    assert found == [greedy(model, prompt, 32) for prompt in PROMPTS]
    ids = torch.tensor([PROMPTS[-1]])
    with torch.no_grad():
        torch.testing.assert_close(engine(ids), model(ids).logits, rtol=0, atol=1e-4)


def test_a_plain_module_computes_on_the_device(tmp_path) -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    x = torch.randn(3, 8)
    engine = tw.compile(module, (x,))
    found = engine(x)
    assert engine.runner.device.type == "cuda" and found.device == x.device
    torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-5)
    assert engine(x.cuda()).device.type == "cuda"
    engine.save(tmp_path / "engine")
    torch.testing.assert_close(tw.load(tmp_path / "engine")(x), found)

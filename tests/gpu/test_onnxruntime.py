"""ONNX Runtime on the GPU: its CUDA provider where it is installed, else an error that says how."""

from __future__ import annotations

import pytest

import tilewright as tw
from tilewright.codegen.onnx.providers import cuda_missing
from tilewright.errors import UnsupportedError
from tilewright.targets import Target
from tiny_models import PROMPTS, greedy, tiny_model

pytestmark = pytest.mark.gpu


def test_tokens_by_the_cuda_provider() -> None:
    model = tiny_model("llama")
    options = {"backend": "onnxruntime", "target": Target.detect(), "max_model_len": 64}
    if cuda_missing():
        with pytest.raises(UnsupportedError, match="onnxruntime-gpu"):
            tw.compile(model, **options)
        return
    engine = tw.compile(model, **options)
    params = tw.SamplingParams(max_new_tokens=16, ignore_eos=True)
    found = [completion.token_ids for completion in engine.generate(PROMPTS, params)]
    assert found == [greedy(model, prompt, 16) for prompt in PROMPTS]

"""SmolLM2-135M-Instruct: whole from its GGUF file, its first layers from a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import tilewright as tw
from e2e.smollm2 import hugging_face_model, write_folder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

QUESTION = "What is the capital of France?"
LAYERS = 2  # of the folder; the GGUF file has all 30
MESSAGES = [{"role": "user", "content": QUESTION}]


def test_smollm2_knows_paris_and_agrees_with_hugging_face(smollm2_gguf) -> None:
    engine, prompt = compared(smollm2_gguf, hugging_face_model(smollm2_gguf))
    completion = engine.generate([prompt], tw.SamplingParams(max_new_tokens=12))[0]
    assert "Paris" in completion.text
    assert engine.report()["aten"] == []
    streamed = "".join(
        delta.text for delta in engine.stream(prompt, tw.SamplingParams(max_new_tokens=12))
    )
    assert streamed == completion.text


@pytest.mark.nightly  # tiny models come from folders each day
def test_its_first_layers_agree_from_a_folder(smollm2_gguf, tmp_path) -> None:
    # The same layers again would take as long, and show no more.
    reference = hugging_face_model(smollm2_gguf)
    reference.model.layers = reference.model.layers[:LAYERS]
    reference.config.num_hidden_layers = LAYERS
    write_folder(smollm2_gguf, reference, tmp_path / "smollm2")
    compared(tmp_path / "smollm2", reference)


def compared(path: Path, reference: LlamaForCausalLM) -> tuple[tw.Engine, list[int]]:
    """An engine of the model, whose logits are the reference's, and the prompt they are of."""
    engine = tw.compile(path, max_model_len=256, max_batch_size=2, verify="structure")
    prompt = engine.chat_prompt(MESSAGES)
    with torch.no_grad():
        expected = reference(torch.tensor([prompt]), use_cache=False).logits[0]
    torch.testing.assert_close(engine(torch.tensor(prompt)), expected, atol=1e-3, rtol=0)
    return engine, prompt

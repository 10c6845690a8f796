"""Decoders as TensorRT networks, by the reference of the layers, beside Hugging Face."""

from __future__ import annotations

import pytest

from tensorrt_running import agrees_with_hugging_face, lowered
from tiny_models import tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_logits_and_tokens_are_hugging_faces(family: str) -> None:
    model = tiny_model(family)
    agrees_with_hugging_face(lowered(model, "float32"), model)

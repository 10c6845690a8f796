"""An encoder on the GPU: batches of any lengths give transformers' vectors."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler.encoders import open_encoder
from tiny_encoder import save_bert

pytestmark = pytest.mark.gpu
TEXTS = ["the quick brown fox", "a dog", "the fox jumps over the lazy dog over the fox", "cat"]


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_vectors_are_transformers_own(tmp_path, pooling) -> None:
    model = save_bert(tmp_path / "bert", pooling=pooling).double()
    encoder = open_encoder(tmp_path / "bert")
    assert encoder.engine.target.device_type == "cuda"
    for texts in (TEXTS, TEXTS[:1], TEXTS * 20):
        rows = [encoder.token_ids(text, 0) for text in texts]
        found = encoder.embed(rows)
        for row, vector in zip(rows, found, strict=True):
            with torch.no_grad():
                hidden = model(torch.tensor([row])).last_hidden_state[0]
            wanted = hidden[0] if pooling == "cls_token" else hidden.mean(0)
            torch.testing.assert_close(vector.double(), wanted / wanted.norm(), atol=2e-3, rtol=0)

"""The tiny models are worth testing with: seeded, varied, and without near-ties."""

from __future__ import annotations

import pytest
import torch

from tiny_models import FAMILIES, NAMED, PROMPTS, RECURRENT, greedy, tiny_model

NEW_TOKENS = 32
MIN_GAP = 1e-3  # ten times what the logits may differ by


def test_there_are_fifteen_named_families():
    assert len(NAMED) == 15
    assert {*NAMED, *RECURRENT} <= set(FAMILIES)
    assert not set(NAMED) & set(RECURRENT)


@pytest.mark.parametrize("name", NAMED)
def test_greedy_tokens_are_varied_and_not_near_tied(name):
    model = tiny_model(name)
    for prompt in PROMPTS:
        new = greedy(model, prompt, NEW_TOKENS)
        assert len(new) == NEW_TOKENS
        assert len(set(new)) > 4
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        best, second = logits.topk(2).values.unbind(-1)
        assert (best - second).min() > MIN_GAP


def test_weights_follow_the_seed_alone():
    torch.manual_seed(1)
    first = tiny_model("llama").state_dict()
    torch.manual_seed(2)
    again, other = tiny_model("llama").state_dict(), tiny_model("llama", seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_tied_weights_stay_tied():
    model = tiny_model("gpt2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

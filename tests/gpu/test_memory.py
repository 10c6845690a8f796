"""Reads stay within bounds on the device: poisoned pages, NaN beyond lengths, in graphs too."""

from __future__ import annotations

import pytest
import torch

import tilewright as tw
from tiny_models import PROMPTS, greedy, tiny_model

pytestmark = pytest.mark.gpu
PARAMS = tw.SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_poisoned_caches_change_no_token(name: str) -> None:
    model = tiny_model(name)
    engine = tw.compile(model, backend="triton")
    for tensor in engine.executor.caches.tensors.values():
        tensor.fill_(torch.nan)
    found = [c.token_ids for c in engine.generate(PROMPTS, PARAMS)]
    assert found == [greedy(model, prompt, 24) for prompt in PROMPTS]


def test_block_tables_beyond_the_lengths_are_never_followed() -> None:
    model = tiny_model("llama")
    engine = tw.compile(model, backend="triton")
    pool = engine.pool
    gather = pool.block_tables

    def poisoned(seqs):
        tables = gather(seqs)
        for row, seq in enumerate(seqs):
            used = -(-pool.length(seq) // pool.page_size)
            tables[row, used:] = 1 << 30
        return torch.cat([tables, torch.full((len(seqs), 2), -7, dtype=torch.int32)], 1)

    pool.block_tables = poisoned
    found = [c.token_ids for c in engine.generate(PROMPTS, PARAMS)]
    assert found == [greedy(model, prompt, 24) for prompt in PROMPTS]

"""A model of a small byte-level vocabulary that writes at random, and closes what it opens."""

from __future__ import annotations

import zlib
from functools import cache

import torch

from fake_executor import PAGED, FakeExecutor
from tilewright.formats.tokenizer import Tokenizer, TokenizerConfig
from tilewright.runtime import Capabilities, GenerationLoop, PagedPool, Sampler, Scheduler, SlotPool
from tilewright.runtime.grammar import Grammars
from tiny_gguf import tiny_bpe

VOCAB = 330  # wider than the tokenizer's, as padded embeddings are
EOS = (0, 2)
MAX_LEN = 512
MIXES, SLOTS = PAGED, Capabilities(mixes=False, pages=False, shares=False, max_slots=4)


@cache
def tokenizer() -> Tokenizer:
    """With two end-of-sequence tokens."""
    return Tokenizer(tiny_bpe(), TokenizerConfig(eos_token_ids=EOS))


def closing(tokenizer: Tokenizer, vocab_size: int) -> torch.Tensor:
    """A bias towards ends, and away from whitespace that could go on for ever."""
    bias = torch.zeros(vocab_size)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        if text and set(text) <= set('"]}'):
            bias[token] = 3.0
        if not text.strip():
            bias[token] = -1.0
    return bias


@cache
def _bias() -> torch.Tensor:
    return closing(tokenizer(), VOCAB)


def logits_of(tokens: list[int]) -> torch.Tensor:
    """f32[VOCAB] after these tokens: noise of their checksum, and the bias."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(tokens).encode()))
    return 2 * torch.randn(VOCAB, generator=generator) + _bias()


def writing_loop(capabilities: Capabilities = MIXES, num_pages: int = 400, **knobs: int):
    """A loop over the model, with pages of 8 tokens or with slots."""
    executor = FakeExecutor(capabilities, logits=logits_of)
    pool = PagedPool(num_pages, 8) if capabilities.pages else SlotPool(4, MAX_LEN)
    scheduler = Scheduler(pool, capabilities, **knobs)
    grammars = Grammars(tokenizer(), EOS, VOCAB)
    return GenerationLoop(
        executor, pool, scheduler, Sampler(), tokenizer(), EOS, MAX_LEN, VOCAB, grammars
    )

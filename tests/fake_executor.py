"""A tiny language model whose next token depends on every token, and on its place in the memory.

Its K and V are the token ids themselves. The executor keeps them in a memory of pages that starts
as garbage and is never cleaned, and reads each sequence back through its block table: a wrong page,
slot, length, copy or row changes the tokens.
"""

from __future__ import annotations

import torch

from tilewright.runtime import Capabilities
from tilewright.runtime.bucketing import Padding

VOCAB = 23
PAGED = Capabilities(mixes=True, pages=True, shares=True, max_slots=None)
_PRIME = 1_000_003


def logits_of(tokens: list[int]) -> torch.Tensor:
    """f32[VOCAB] after these tokens, in plain Python integers."""
    digest = 7
    for position, token in enumerate(tokens):
        digest = (digest * 31 + token * 17 + position) % _PRIME
    return torch.tensor([((digest * (v + 1) + v * v * 7919) % 10_007) / 1000 for v in range(VOCAB)])


def seen(tokens: list[int], length: int, slides: tuple[int, int] | None) -> list[int]:
    """What the last of `length` tokens sees of those that are left: all, or those of a window and
    of the sinks before it, and how many there have been.
    """
    if slides is None or length <= sum(slides):
        assert len(tokens) == length
        return tokens
    window, sinks = slides
    return [*tokens[:sinks], *tokens[-window:], length]


def greedy(prompt: list[int], count: int) -> list[int]:
    """The oracle: no pages, no batch, every step from all tokens."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(tokens).argmax()))
    return tokens[len(prompt) :]


class FakeExecutor:
    """Runs the model over its own memory and checks that each step keeps the contract."""

    def __init__(
        self,
        capabilities: Capabilities = PAGED,
        fail_at: int | None = None,
        logits=logits_of,
        slides: tuple[int, int] | None = None,
    ) -> None:
        self.capabilities, self.logits, self.slides = capabilities, logits, slides
        self.fail_at = fail_at
        self.padding = Padding()
        self.num_steps = 0
        self.most_tokens = 0
        self.most_sequences = 0

    def allocate(self, num_pages, page_size, host_pages=0):
        self.page_size = page_size
        self.memory = torch.randint(-10_000, -1, (num_pages + host_pages, page_size))

    def copy_pages(self, sources, destinations):
        for source, destination in zip(sources, destinations, strict=True):
            assert source != destination
            self.memory[destination] = self.memory[source]

    def recover(self):
        return None

    def run(self, step):
        self.num_steps += 1
        if self.num_steps == self.fail_at:
            raise KeyboardInterrupt
        self._check(step)
        flat = self.memory.view(-1)
        flat[step.slot_mapping] = step.token_ids
        rows = []
        for row in step.logits_indices.tolist():
            b = int(torch.searchsorted(step.query_start[1:], row, right=True))
            behind = int(step.query_start[b + 1]) - 1 - row
            left = self._read(step, b, int(step.seq_lens[b]) - behind)
            rows.append(self.logits(seen(left, int(step.positions[row]) + 1, self.slides)))
        return torch.stack(rows) if rows else torch.empty(0, VOCAB)

    def _read(self, step, b, length):
        if not self.capabilities.pages:
            return self.memory[int(step.block_tables[b, 0]), :length].tolist()
        pages = self.memory[step.block_tables[b].long()].reshape(-1)
        return pages[:length].tolist()

    def _check(self, step):
        counts = step.query_start.diff()
        num_tokens, num_seqs = len(step.token_ids), len(step.seq_lens)
        self.most_tokens = max(self.most_tokens, num_tokens)
        self.most_sequences = max(self.most_sequences, num_seqs)
        assert step.token_ids.dtype == step.positions.dtype == step.slot_mapping.dtype
        assert step.token_ids.dtype == step.logits_indices.dtype == torch.int64
        assert step.query_start.dtype == step.seq_lens.dtype == step.block_tables.dtype
        assert step.block_tables.dtype == torch.int32
        assert all(getattr(step, f).is_contiguous() for f in step.__slots__)
        assert len(step.positions) == len(step.slot_mapping) == num_tokens == step.query_start[-1]
        assert len(step.block_tables) == num_seqs == len(counts)
        assert (counts > 0).all()
        assert len(set(step.slot_mapping.tolist())) == num_tokens
        gaps = step.positions[(step.query_start[1:] - 1).long()] + 1 - step.seq_lens
        assert (gaps >= 0).all() and not (gaps % self.page_size).any()
        assert self.slides is not None or not gaps.any()
        limit = self.capabilities.max_slots
        assert limit is None or num_seqs <= limit
        if not self.capabilities.mixes:
            whole_prefill = (counts == step.seq_lens).all()
            whole_prefill &= num_seqs <= self.capabilities.prefills
            assert whole_prefill or (counts == 1).all()

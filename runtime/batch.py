"""From the scheduler's plan to the tensors of a step."""

from __future__ import annotations

import torch

from .pool import KVPool
from .scheduler import Plan
from .step import Step


def build_step(plan: Plan, pool: KVPool) -> Step:
    """The tensors of a plan with at least one chunk. Lists first, one tensor each at the end: a few
    microseconds a tensor at decode, and nothing that grows with the sequences' lengths but M."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_start, seq_lens, logits_indices = [0], [], []
    for chunk in plan.chunks:
        start, count = chunk.start, len(chunk.slots)
        token_ids += chunk.seq.tokens[start : start + count]
        positions += range(start, start + count)
        slots += chunk.slots
        query_start.append(len(token_ids))
        seq_lens.append(start + count)
        if chunk.completes:
            logits_indices.append(len(token_ids) - 1)
    return Step(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions),
        query_start=torch.tensor(query_start, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        block_tables=pool.block_tables([chunk.seq.id for chunk in plan.chunks]),
        logits_indices=torch.tensor(logits_indices, dtype=torch.int64),
    )

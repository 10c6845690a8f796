"""Prompts of several slots as the rows of one batch, each padded behind its end to the longest.

Nothing but causal attention mixes tokens (the cache pass has proved it), so no token sees the
padding behind it. What the padding leaves in the slots is overwritten before it is read: a decode
step writes a sequence's next place, and reads up to there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .step import Step


@dataclass(frozen=True, slots=True)
class SlotBatch:
    """B prompts in the slots [first, first + B), S tokens each.

    Attributes:
        first: the first slot.
        inputs: token_ids and positions i64[B * S], seq_lens i32[B], logits_indices i64[R].
        rows: i64[R], which rows of the step's logits these are.
        padding: tokens of the batch that belong to no prompt.
    """

    first: int
    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor
    padding: int

    @property
    def stop(self) -> int:
        """The slot behind the last."""
        return self.first + len(self.inputs["seq_lens"])


def slot_batches(step: Step, slots: list[int]) -> Iterator[SlotBatch]:
    """The batches of a step of whole prompts: one for each run of neighbouring slots.

    Args:
        step: of B prompts.
        slots: of each of them.
    """
    order = sorted(range(len(slots)), key=slots.__getitem__)
    begin = 0
    for index in range(1, len(order) + 1):
        if index < len(order) and slots[order[index]] == slots[order[index - 1]] + 1:
            continue
        yield _batch(step, order[begin:index], slots[order[begin]])
        begin = index


def _batch(step: Step, members: list[int], first: int) -> SlotBatch:
    starts = step.query_start.long()
    counts = starts.diff()[members]  # [B]
    count, longest = len(members), int(counts.max())
    places = torch.arange(longest)
    ids = torch.zeros(count, longest, dtype=step.token_ids.dtype)
    real = places < counts[:, None]  # [B, S]
    ids[real] = torch.cat([step.token_ids[starts[one] : starts[one + 1]] for one in members])
    # Where a token of the step is in the batch; -1 if it is in another one.
    where = torch.full((len(step.token_ids),), -1)
    for row, one in enumerate(members):
        length = int(counts[row])
        where[starts[one] : starts[one + 1]] = row * longest + places[:length]
    wanted = where[step.logits_indices]
    rows = (wanted >= 0).nonzero()[:, 0]
    inputs = {
        "token_ids": ids.flatten(),
        "positions": places.repeat(count),
        "seq_lens": torch.full((count,), longest, dtype=torch.int32),
        "logits_indices": wanted[rows],
    }
    return SlotBatch(first, inputs, rows, count * longest - int(counts.sum()))

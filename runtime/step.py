"""What the scheduler hands to an executor, and what an executor declares that it can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import KernelError
from .bucketing import Padding


@dataclass(frozen=True, slots=True)
class Step:
    """T tokens of B sequences, R of them to be sampled from; contiguous tensors on the CPU.

    The tokens of a sequence are consecutive in T. In a decode step every sequence has one token.

    Attributes:
        token_ids: i64[T].
        positions: i64[T], the absolute position of each token in its sequence.
        query_start: i32[B+1], prefix sums of each sequence's number of tokens in this step.
        seq_lens: i32[B], the length of each sequence including this step's tokens, without those
            that its block table leaves out.
        slot_mapping: i64[T], page * page_size + offset: where the token's K and V are written.
        block_tables: i32[B, M], the page ids of each sequence, unused entries 0.
        logits_indices: i64[R], the rows of T whose logits are wanted; R may be 0 in a step that
            holds nothing but chunks of prompts.
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    logits_indices: Tensor


def padding_step(lengths: Sequence[int], pages: int) -> Step:
    """New prompts of padding, which write to slot 0, in the reserved page 0.

    Args:
        lengths: tokens of each.
        pages: that each has in its block table.
    """
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    total = int(ends[-1])
    return Step(
        token_ids=torch.zeros(total, dtype=torch.int64),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        query_start=ends,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        slot_mapping=torch.zeros(total, dtype=torch.int64),
        block_tables=torch.zeros(len(lengths), pages, dtype=torch.int32),
        logits_indices=ends[1:].long() - 1,
    )


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an executor can take.

    Attributes:
        mixes: takes any mix of prefill chunks and decode tokens in one step. Else a step is either
            the whole prefill of up to `prefills` sequences, or one token of each of several.
        pages: reads K and V through block tables of many pages. Else a sequence is one slot.
        shares: lets several block tables hold the same page.
        max_slots: the most sequences in one step, None for no limit.
        shared_tokens: what attention by groups of sequences that share pages costs in a decode
            step, as tokens that are read in that time (`PrefixGroups.pay`); None if each sequence
            is read by itself.
        prefills: the most sequences whose whole prompts one step takes, for executors that do not
            mix.
        samples: the most sequences in a decode step that samples on the device, so that the next
            one can be launched before the host has seen its tokens (`in_flight.py`); 0 if none can.
        samples_mixed: the most sequences whose next tokens any other step samples there.
    """

    mixes: bool
    pages: bool
    shares: bool
    max_slots: int | None
    samples: int = 0
    samples_mixed: int = 0
    prefills: int = 1
    shared_tokens: int | None = None


class StepExecutor(Protocol):
    """Runs steps of one model over the KV buffers that it owns.

    Attributes:
        padding: what it has computed beside the steps' own tokens.
    """

    padding: Padding

    @property
    def capabilities(self) -> Capabilities:
        """What this executor can take."""
        ...

    def run(self, step: Step) -> Tensor:
        """Writes the K and V of the step's tokens and returns logits f32[R, V]."""
        ...

    def recover(self) -> KernelError | None:
        """Makes good what a launch has left behind that was given up, which its numbers are not:
        its error, None if there was none.
        """
        ...

    def copy_pages(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies whole pages (or slots), in order, in the buffers of every layer; ids from the
        number of pages on are the host's.
        """
        ...

    def allocate(self, num_pages: int, page_size: int, host_pages: int = 0) -> None:
        """(Re)creates the KV buffers, and pages of the host; whatever they held is lost."""
        ...

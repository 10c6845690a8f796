"""What the loop has done so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .bucketing import Padding
from .plan import Chunk
from .prefix_cache import PrefixCounters


@dataclass(slots=True)
class Counters:
    """Sums over the life of a loop.

    Without preemption a sequence of p prompt and c output tokens costs p + c - 1 computed tokens:
    `tokens_computed` then proves that no past token is computed twice.

    Attributes:
        steps: executor steps.
        tokens_computed: tokens that went through the model: prefill_tokens + decode_tokens.
        prefill_tokens: those of prompts, and of preempted sequences computed anew.
        decode_tokens: those that were generated the step before, or forced by their form with it.
        recomputed_tokens: tokens computed a second time, after a preemption or a fork without room.
        discarded_tokens: tokens computed ahead for sequences that turned out to have ended, or were
            dropped; not among tokens_computed.
        sampled_tokens: tokens chosen.
        copied_pages: pages copied for forks, and for prompts that are equal within a page.
        prefill_seconds: time in steps that hold any prefill tokens.
        decode_seconds: time in all other steps.
        prefix: what the prefix cache was asked for, gave and gave up.
        padding: tokens computed to fill batches, which are not among the others.
    """

    steps: int = 0
    tokens_computed: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    recomputed_tokens: int = 0
    discarded_tokens: int = 0
    sampled_tokens: int = 0
    copied_pages: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefix: PrefixCounters = field(default_factory=PrefixCounters)
    padding: Padding = field(default_factory=Padding)

    @property
    def padding_tokens(self) -> int:
        """Tokens that went through the model for nobody, to fill batches."""
        return self.padding.total

    @property
    def padding_share(self) -> float:
        """Of all tokens that went through the model, 0 to 1."""
        return self.padding.share(self.tokens_computed + self.discarded_tokens)

    def step(
        self,
        chunks: Iterable[Chunk],
        sampled: int,
        seconds: float,
        discarded: int = 0,
        decoded: int = 0,
    ) -> None:
        """Adds a step that took `seconds` and chose `sampled` tokens.

        Args:
            chunks: what it computed.
            discarded: tokens that it computed beside, for nobody.
            decoded: new tokens of sequences that decode, which have been noted as reached.
        """
        prefill, recomputed, total = 0, 0, decoded
        for chunk in chunks:
            seq, start, count = chunk.seq, chunk.start, len(chunk.slots)
            reached, stop = seq.num_reached, start + count
            total += count
            if not decodes(chunk):
                prefill += count
            if start < reached:
                recomputed += min(stop, reached) - start
            if stop > reached:
                seq.num_reached = stop
        self.steps += 1
        self.tokens_computed += total
        self.prefill_tokens += prefill
        self.decode_tokens += total - prefill
        self.recomputed_tokens += recomputed
        self.discarded_tokens += discarded
        self.sampled_tokens += sampled
        if prefill:
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds


def decodes(chunk: Chunk) -> bool:
    """Whether it is of tokens that were generated the step before, and not of a prompt. Several of
    them were forced, unless they had been computed before.
    """
    seq, new = chunk.seq, len(chunk.slots) == 1 or chunk.start >= chunk.seq.num_reached
    return new and chunk.start >= len(seq.request.prompt)

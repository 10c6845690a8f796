"""Length-bucketed batching: prompts of about one length are computed together, padded to the
longest of them, where a backend takes no ragged tokens.

A lone prompt needs no padding, but its step reads all weights, which costs a CPU about as much as
computing ten tokens does (SmolLM2 in four bits: 50 ms a step and 5 a token). Prompts at once share
that, and pay for it with padding. So the buckets bound the padding of a prompt twice: to a share of
the batch, and to what a step costs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

from ..errors import UnsupportedError, UsageError
from .image import Batching, LMConfig
from .request import Sequence as RunningSequence

__all__ = ["Batching", "LengthBuckets", "Padding", "check_batching", "length_buckets"]

GROWTH, WIDTH = 1.25, 16
BATCHING = get_args(Batching)


@dataclass(slots=True)
class Padding:
    """Tokens that an executor has computed for nobody, to fill a batch.

    Attributes:
        prefill: in steps with prompts: behind the ends of these, up to the longest of their batch,
            or up to the size that a graph was captured for.
        decode: in rows of a decode step that hold no sequence of it.
    """

    prefill: int = 0
    decode: int = 0

    @property
    def total(self) -> int:
        """Of both phases."""
        return self.prefill + self.decode

    def share(self, computed: int) -> float:
        """Of all tokens that went through the model, `computed` of them for somebody; 0 to 1."""
        return self.total / (self.total + computed) if self.total else 0.0


@dataclass(frozen=True, slots=True)
class LengthBuckets:
    """Ranges of lengths, each of which ends at its bound; beyond the last, one more.

    Attributes:
        bounds: tokens, rising, 1 or more.

    Raises:
        UsageError: bounds that do not rise, or are below 1.
    """

    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0, *self.bounds), self.bounds, strict=False))
        if not rising:
            raise UsageError(
                "LengthBuckets.bounds",
                expected="rising numbers of tokens, 1 or more",
                found=str(self.bounds),
                remedy="Sort them, each once; LengthBuckets.up_to makes some.",
            )

    @classmethod
    def up_to(cls, longest: int, growth: float = GROWTH, width: int = WIDTH) -> LengthBuckets:
        """Buckets for lengths of 1 to `longest`, of `width` lengths at most, in which the longest
        is at most `growth` times the shortest: less than 1 - 1 / growth of a batch is padding.

        Raises:
            UsageError: a growth or a width below 1.
        """
        for name, value in (("growth", growth), ("width", width)):
            if not value >= 1:
                raise UsageError(
                    name,
                    expected="1 or more",
                    found=str(value),
                    remedy="Raise it, or leave it out.",
                )
        bounds = [1]
        while (last := bounds[-1]) < longest:
            bounds.append(min(longest, int((last + 1) * growth), last + width))
        return cls(tuple(bounds))

    def of(self, length: int) -> int:
        """Which bucket a length belongs to."""
        return bisect_left(self.bounds, length)

    def companions(
        self, waiting: Sequence[RunningSequence], most: int, tokens: int
    ) -> list[RunningSequence]:
        """Who is computed together with the first that waits, who goes first whoever may fit
        better: each step that starts any brings every waiting one nearer to its turn.

        They are of its bucket and priority. Those that want logprobs of their prompts, of which
        each token has a row of logits, stay alone, and so do those of several completions, which
        take more slots as soon as the prompt is computed.

        Args:
            waiting: by rank, whole prompts.
            most: sequences in all.
            tokens: of the batch, padding included.

        Returns:
            them without the first, by rank.
        """
        first = waiting[0]
        if most < 2 or _alone(first):
            return []
        bucket, priority = self.of(first.remaining), first.request.params.priority
        longest = first.remaining
        found: list[RunningSequence] = []
        for seq in waiting[1:]:
            if seq.request.params.priority != priority:
                break
            if self.of(seq.remaining) != bucket or _alone(seq):
                continue
            padded = max(longest, seq.remaining)
            if padded * (len(found) + 2) > tokens:
                continue
            longest = padded
            found.append(seq)
            if len(found) + 1 == most:
                break
        return found


def _alone(seq: RunningSequence) -> bool:
    return seq.request.scoring or not seq.request.forked


def check_batching(value: object, kv_cache: str) -> Batching:
    """What `tw.load` was given, for a cache of this form.

    Raises:
        UsageError: there is no such batching.
        UnsupportedError: "bucketed" for a paged cache.
    """
    if value not in BATCHING:
        raise UsageError(
            "option batching",
            expected=f"one of {', '.join(BATCHING)}",
            found=repr(value),
            remedy="Choose one of those.",
        )
    if value == "bucketed" and kv_cache != "slot":
        raise UnsupportedError(
            "option batching='bucketed'",
            expected="an engine with a slot cache, whose prompts are padded",
            found="a paged cache, which computes prompts of all lengths together without padding",
            remedy="Leave it out, or compile with kv_cache='static'.",
        )
    return cast(Batching, value)


def length_buckets(config: LMConfig) -> LengthBuckets | None:
    """The buckets of an engine's prompts; None where each is computed alone, or none is padded."""
    if config.kv_cache != "slot" or config.batching == "continuous":
        return None
    return LengthBuckets.up_to(config.max_model_len)

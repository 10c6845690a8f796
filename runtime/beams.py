"""The rules of beam search: those of Hugging Face's `generate(num_beams=…)`.

Of all continuations of the beams by one token, the best (1 + end tokens) * width are looked at, so
that width of them can go on. Those among the best width that end are finished, with their score:
the sum of their logprobs over length ** length_penalty. The best width of all finished ones are
kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UsageError
from .output import FinishReason


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """How to search.

    Attributes:
        beam_width: how many sequences are followed, and returned for each prompt.
        max_new_tokens: the most tokens to generate, at least 1.
        length_penalty: scores are divided by length to this power: above 0 long sequences gain.
        early_stopping: True ends as soon as beam_width sequences are finished; False when the best
            beam, were it to end now, would not be among them; "never" when no beam can be any more.

    Raises:
        UsageError: a field of the wrong type or out of its range.
    """

    beam_width: int = 4
    max_new_tokens: int = 256
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_new_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _wrong(name, "an integer, 1 or more", value)
        penalty = self.length_penalty
        is_number = isinstance(penalty, int | float) and not isinstance(penalty, bool)
        if not is_number or not math.isfinite(penalty):
            raise _wrong("length_penalty", "a finite number", penalty)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise _wrong("early_stopping", "True, False or 'never'", self.early_stopping)


@dataclass(frozen=True, slots=True)
class BeamCompletion:
    """One of the sequences that a search has found.

    Attributes:
        token_ids: the generated tokens, a final end-of-sequence token included.
        text: their text, without that token.
        score: the sum of their logprobs, divided by length ** length_penalty.
        finish_reason: "stop" (end of sequence) or "length".
    """

    token_ids: list[int]
    text: str
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Continuation:
    """A beam and one more token; `total` is the sum of logprobs with it."""

    parent: int
    token: int
    total: float


@dataclass(slots=True)
class Search:
    """The search behind one prompt.

    Attributes:
        index: of the prompt among others.
        prompt: its token ids.
        most: the most tokens to generate.
        seqs: of the running beams, best first, in the pool.
        outputs: their generated tokens, the last of which is not computed yet.
        totals: the sums of their logprobs.
        finished: (score, tokens) of those that have ended, best first.
        done: whether they stay as they are.
    """

    index: int
    prompt: list[int]
    most: int
    seqs: list[int]
    outputs: list[list[int]] = field(default_factory=lambda: [[]])
    totals: list[float] = field(default_factory=lambda: [0.0])
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def most_pages(self, width: int, page_size: int) -> int:
        """Pages of so many beams that share the prompt's full pages and nothing else."""
        shared = len(self.prompt) // page_size
        return shared + width * (-(-(len(self.prompt) + self.most) // page_size) - shared)

    def take(
        self, best: Sequence[Continuation], params: BeamSearchParams, eos: Collection[int]
    ) -> list[Continuation]:
        """Takes the best continuations, best first, and returns those that are the new beams."""
        width, length = params.beam_width, len(self.outputs[0]) + 1
        at_limit = length >= self.most
        ends = [at_limit or one.token in eos for one in best]
        going = [one for one, end in zip(best, ends, strict=True) if not end][:width]
        for one, end in zip(best[:width], ends, strict=False):
            if end:
                tokens = [*self.outputs[one.parent], one.token]
                self.finished.append((one.total / length**params.length_penalty, tokens))
        self.finished.sort(key=lambda pair: -pair[0])
        del self.finished[width:]
        self.outputs = [[*self.outputs[one.parent], one.token] for one in going]
        self.totals = [one.total for one in going]
        self.done = not going or self._settled(length, params)
        return going

    def _settled(self, length: int, params: BeamSearchParams) -> bool:
        """Whether what is finished stays as it is."""
        if len(self.finished) < params.beam_width:
            return False
        if params.early_stopping is True:
            return True
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self.most
        return bool(self.totals[0] / length**params.length_penalty <= self.finished[-1][0])


def _wrong(field_name: str, valid: str, found: object) -> UsageError:
    return UsageError(
        f"BeamSearchParams.{field_name}",
        expected=valid,
        found=repr(found),
        remedy=f"Pass a valid {field_name}, or leave it out for the default.",
    )

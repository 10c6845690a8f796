"""What comes out of a generation: completions, and the pieces of one as they come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "deadline", "error"]
"""Why a completion ended; with "error" there is none, but what it raises."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one place, of the model's own distribution before penalties and filters.

    Attributes:
        token_id: the chosen token.
        logprob: its natural log-probability.
        top: (token id, logprob) of the likeliest tokens, best first, as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that went in and came out.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, a final stop token included.
        cached_tokens: of the prompt's tokens, those whose K and V were not computed for this
            completion but shared with, or copied from, another.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True)
class Timings:
    """When one completion's tokens came, in seconds of the loop's clock (`time.perf_counter()`).

    The terms are vLLM's, of its request histograms and of `vllm bench serve`. `queue`, `prefill`
    and `decode` follow each other, and together they are `e2e`; what preemptions cost is in the one
    in which they happen. One difference: vLLM's queue time begins when its scheduler takes the
    request, `queue` on arrival, so that it holds the rest of the step that was running then.

    Attributes:
        submitted: when the request arrived.
        scheduled: when the first step with tokens of it was planned; None before. The `n`
            completions of a prompt share it.
        ttft: from arrival to the first token (TTFT).
        itl: between one token and the next (ITL), one entry fewer than there are tokens.
        preemptions: how often its pages were taken away, so that it had to start anew.
        last: when the last token came, None before the first.
    """

    submitted: float
    scheduled: float | None = None
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    preemptions: int = 0
    last: float | None = None

    def token(self, now: float) -> None:
        """Notes that a token came at `now`."""
        if self.last is None:
            self.ttft = now - self.submitted
        else:
            self.itl.append(now - self.last)
        self.last = now

    @property
    def tpot(self) -> float:
        """Mean time per output token after the first (TPOT), in seconds; 0 for a single token."""
        return sum(self.itl) / len(self.itl) if self.itl else 0.0

    @property
    def queue(self) -> float:
        """From arrival until it was first scheduled, in seconds; 0 before that."""
        return 0.0 if self.scheduled is None else self.scheduled - self.submitted

    @property
    def prefill(self) -> float:
        """From when it was first scheduled to its first token, in seconds; 0 before that."""
        return 0.0 if self.last is None else self.ttft - self.queue

    @property
    def decode(self) -> float:
        """From the first token to the last, in seconds; 0 before there are two."""
        return 0.0 if self.last is None else self.last - self.submitted - self.ttft

    @property
    def e2e(self) -> float:
        """From arrival to the last token (end to end, E2EL), in seconds; 0 before the first."""
        return 0.0 if self.last is None else self.last - self.submitted


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion.

    Attributes:
        token_ids: the generated tokens, a final stop token included.
        text: their text, without the stop token and cut before a stop string.
        finish_reason: "stop" (end of sequence, stop token or stop string), "length"
            (`max_new_tokens`, or the context is full) or "deadline" (`SamplingParams.deadline`).
        logprobs: one entry a token, or None if they were not asked for.
        usage: token counts.
        timings: when the tokens came.
        prompt_logprobs: one entry a token of the prompt, None for the first, which nothing comes
            before, and for those before `prompt_logprobs_start`; or None if they were not asked
            for.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    usage: Usage
    timings: Timings = field(compare=False, repr=False)
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(slots=True)  # not frozen: making one, as every token of a stream does, would take thrice
class Delta:
    """What one step added to one completion of a stream.

    Attributes:
        index: which of the `n` completions.
        text: text that is now certain; text that may turn out to begin a stop string is held back.
        token_ids: the new tokens.
        finish_reason: set in the last delta of the completion.
        logprobs: one entry for each of `token_ids`, if they were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None

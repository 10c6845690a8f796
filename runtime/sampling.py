"""From logits to tokens: parameters and a random stream for each row, one path for the batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import VerificationError
from .filters import (
    add_bias,
    apply_temperature,
    draw,
    keep_min_p,
    keep_only,
    keep_top_k,
    keep_top_p,
    penalise,
)
from .grammar import Matcher, banned, prepare
from .output import TokenLogprobs
from .params import SamplingParams

BROKEN = -1  # the token of a row without a finite largest logit, as devices have it too
_BLOCK = 128  # numbers drawn at once: a call takes 10 µs


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token, with its logprobs where they were asked for.

    Attributes:
        token_id: BROKEN if the row has NaN, infinite or no allowed logits.
        logprobs: None too if it is broken.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None


class SamplingState:
    """What sampling remembers of one sequence: its random stream and the tokens it has seen.

    Args:
        params: the request's parameters.
        prompt: the prompt's token ids.
        stop_ids: end-of-sequence and stop tokens, masked before `min_new_tokens`.
        index: which of the request's `n` completions: each has a stream of its own.
        matcher: holds the sequence to its form; None for any.

    Attributes:
        output: the tokens that have been committed.
    """

    __slots__ = (
        "_allowed",
        "_biased",
        "_counts",
        "_first",
        "_generator",
        "_index",
        "_numbers",
        "_prompt",
        "_seen",
        "_simple",
        "always_in_step",
        "matcher",
        "output",
        "params",
        "plain",
        "stop_ids",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        stop_ids: frozenset[int],
        index: int = 0,
        matcher: Matcher | None = None,
    ) -> None:
        self.params, self.stop_ids, self.matcher = params, stop_ids, matcher
        # plain: the likeliest token of the logits as they are; read at every step
        self._simple = not params.adjusts and params.logprobs is None
        self.plain = params.is_greedy and self._simple and params.min_new_tokens == 0
        self.plain = self.plain and matcher is None
        # always_in_step: whatever comes, `samples_in_step`
        self.always_in_step = self._simple and matcher is None
        self.always_in_step &= params.min_new_tokens == 0 or not stop_ids
        self._prompt, self._index = prompt, index
        self.output: list[int] = []
        self._generator: torch.Generator | None = None
        self._numbers: list[float] = []  # of the stream, from that of output token _first on
        self._first = 0
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._biased: tuple[Tensor, Tensor] | None = None
        self._allowed: Tensor | None = None

    def commit(self, token_id: int) -> None:
        """Notes a token of the output."""
        self.output.append(token_id)
        if self.matcher is not None:
            self.matcher.advance(token_id)
        if self._seen is not None and self._counts is not None:
            self._seen[token_id] = True
            self._counts[token_id] += 1

    @property
    def masks_stops(self) -> bool:
        """Whether it is too early for a stop token."""
        return len(self.output) < self.params.min_new_tokens and bool(self.stop_ids)

    @property
    def samples_in_step(self) -> bool:
        """Whether temperature, top-k, top-p, min-p, one number and a mask are all that sampling
        needs, so that the device can do it.
        """
        if self.matcher is not None:
            return self._simple and not self.matcher.forces_run
        return self._simple and not self.masks_stops

    def mask(self) -> NDArray[np.int32] | None:
        """What the form lets come next, as `Matcher.words` has it; None if there is no form."""
        if self.matcher is None:
            return None
        return self.matcher.words(self.stop_ids if self.masks_stops else ())

    def uniform(self, ahead: int = 0) -> float:
        """The number in [0, 1) of the sequence's own stream that its next token takes, or the one
        `ahead` tokens later: one a token, the same however often it is asked for. So a step that
        was planned ahead, and discarded or failed, changes nothing.

        It has 24 bits, for float32 to hold it.
        """
        place = len(self.output) + ahead - self._first
        if place >= len(self._numbers):
            self._draw_numbers(ahead)
            place = len(self.output) + ahead - self._first
        return self._numbers[place]

    def uniforms(self, first: int, count: int) -> list[float]:
        """The numbers of so many tokens of the output, from the one with the index `first` on;
        none of these is committed.
        """
        if first + count > self._first + len(self._numbers):
            self._draw_numbers(first + count - 1 - len(self.output))
        place = first - self._first
        return self._numbers[place : place + count]

    def _draw_numbers(self, ahead: int) -> None:
        """Draws the next block, and forgets what committed tokens took.

        Tokens that took none, as greedy ones do, or tokens given from outside, have theirs skipped.
        """
        if self._generator is None:
            self._generator = torch.Generator()
            if self.params.seed is None:
                self._generator.seed()
            else:
                key = hashlib.sha256(f"{self.params.seed}:{self._index}".encode()).digest()
                self._generator.manual_seed(int.from_bytes(key[:8], "big", signed=True))
        taken = len(self.output)  # read once: another thread may tell of more (`Lag.settle`)
        count = _BLOCK + ahead + taken - self._first - len(self._numbers)
        drawn = torch.rand(count, dtype=torch.float64, generator=self._generator)
        drawn = (drawn * 2**24).floor_() / 2**24
        numbers = self._numbers + drawn.tolist()
        self._numbers, self._first = numbers[taken - self._first :], taken

    @property
    def adjusts(self) -> bool:
        """Whether `adjusted` would change the logits."""
        return self.params.adjusts or (self.masks_stops and self.matcher is None)

    def adjusted(self, logits: Tensor) -> Tensor:
        """Logits f32[V] with what is not allowed set to -inf, biases added, penalties taken off and
        early stop tokens masked, as new memory where anything changes. Of the matcher's mask it
        takes no notice.
        """
        vocab, device = logits.shape[-1], logits.device
        if self.params.allowed is not None:
            if self._allowed is None:
                self._allowed = _tensor(self.params.allowed, vocab, device)
            logits = keep_only(logits, self._allowed)
        if self.params.biases:
            if self._biased is None:
                known = [pair for pair in self.params.biases if pair[0] < vocab]
                values = torch.tensor(
                    [value for _, value in known], dtype=logits.dtype, device=device
                )
                self._biased = _tensor([token for token, _ in known], vocab, device), values
            logits = add_bias(logits, *self._biased)
        if self.params.penalises:
            logits = self.penalised(logits)
        if self.masks_stops and self.matcher is None:  # its mask has left them out
            early = _tensor(sorted(self.stop_ids), vocab, device)
            logits = logits.index_fill(-1, early, -torch.inf)
        return logits

    def penalised(self, logits: Tensor) -> Tensor:
        """Logits f32[V] with the penalties taken off, as new memory."""
        if self._seen is None or self._counts is None:
            vocab, device = logits.shape[-1], logits.device
            output = torch.tensor(self.output, dtype=torch.int64, device=device)
            self._counts = torch.bincount(output, minlength=vocab).to(torch.int32)
            self._seen = self._counts > 0
            self._seen[torch.tensor(self._prompt, dtype=torch.int64, device=device)] = True
        p = self.params
        return penalise(
            logits,
            self._seen,
            self._counts,
            p.repetition_penalty,
            p.presence_penalty,
            p.frequency_penalty,
        )


class Sampler:
    """Chooses one token a row. The order of operations is that of Hugging Face and vLLM: the mask
    of a form, allowed tokens, bias, penalties, stop tokens masked before `min_new_tokens`,
    temperature, top-k, top-p, min-p, draw. Greedy rows take the largest logit after penalties, the
    lowest token id among equals.
    """

    def prepare(self, states: Sequence[SamplingState]) -> None:
        """Does what `sample` can do for these rows before it has their logits. To be called while
        the device computes them.
        """
        prepare([state.matcher for state in states if state.matcher is not None])

    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        """One token for each row of logits f32[R, V]; the caller commits it to the state, which
        then draws with another number. A row of broken logits is BROKEN, and changes no other.
        """
        if all(state.plain for state in states):
            return [Sampled(token) for token in _greedy(logits)]
        with _on_this_thread(logits):
            return self._sample(logits, states)

    def _sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        scores = _adjusted(logits, states)
        random = [row for row, state in enumerate(states) if not state.params.is_greedy]
        if len(random) == len(states):
            tokens = _draw(scores, states)
        else:
            tokens = _greedy(scores)
            drawn = _draw(scores[random], [states[row] for row in random]) if random else []
            for row, token in zip(random, drawn, strict=True):
                tokens[row] = token
        return [
            Sampled(token, _logprobs(logits[row], token, states[row].params.logprobs))
            if token != BROKEN
            else Sampled(token)
            for row, token in enumerate(tokens)
        ]


def filtered_logits(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits [R, V] after temperature, top-k, top-p and min-p, what is cut set to -inf."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    scores = apply_temperature(scores, column([p.temperature for p in params]))
    if any(p.top_k for p in params):
        scores = keep_top_k(scores, torch.tensor([p.top_k for p in params], device=scores.device))
    if any(p.top_p < 1 for p in params):
        scores = keep_top_p(scores, column([p.top_p for p in params]))
    if any(p.min_p for p in params):
        scores = keep_min_p(scores, column([p.min_p for p in params]))
    return scores


def _draw(scores: Tensor, states: Sequence[SamplingState]) -> list[int]:
    best = scores.amax(-1)
    values: list[float] = best.tolist()
    finite = all(map(math.isfinite, values))
    if not finite:  # such a row draws from anything
        scores = torch.where(best.isfinite()[:, None], scores, 0.0)
    uniform = torch.tensor([[state.uniform()] for state in states], dtype=torch.float64)
    scores = filtered_logits(scores, [state.params for state in states])
    tokens: list[int] = draw(scores, uniform.to(scores.device)).tolist()
    return tokens if finite else _marked(tokens, values)


def _adjusted(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """The logits [R, V] as each row's state wants them."""
    masks = [state.mask() for state in states]
    free = all(mask is None for mask in masks)
    if free and not any(state.adjusts for state in states):
        return logits
    if free:
        scores = logits.clone()
    else:
        scores = torch.where(banned(masks, logits.shape[-1], logits.device), -torch.inf, logits)
    for row, state in enumerate(states):
        if state.adjusts:
            scores[row] = state.adjusted(scores[row])
    return scores


def _tensor(tokens: Sequence[int], vocab: int, device: torch.device) -> Tensor:
    """The tokens that the model has, as i64."""
    known = [token for token in tokens if token < vocab]
    return torch.tensor(known, dtype=torch.int64, device=device)


@contextmanager
def _on_this_thread(logits: Tensor) -> Iterator[None]:
    """Inside, torch's CPU ops do not go parallel: they leave OpenMP's threads spinning, which costs
    the threads of another runtime a third of the next step (measured with ONNX Runtime).
    """
    threads = torch.get_num_threads()
    if logits.device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _greedy(scores: Tensor) -> list[int]:
    """The first of the largest scores of each row, as both libraries document."""
    ids: list[int]
    if scores.device.type == "cpu":
        # NumPy's argmax is vectorised, and stays on this thread (see _on_this_thread).
        rows = scores.detach().numpy()
        ids = rows.argmax(-1).tolist()  # of a row with NaN: the first NaN
        values = [float(row[token]) for row, token in zip(rows, ids, strict=True)]
    else:
        best, tokens = scores.max(-1)
        values = best.tolist()
        ids = tokens.tolist()
    return _marked(ids, values)


def _marked(tokens: list[int], best: list[float]) -> list[int]:
    """The tokens, BROKEN where the largest logit is not finite."""
    if all(map(math.isfinite, best)):
        return tokens
    pairs = zip(tokens, best, strict=True)
    return [token if math.isfinite(value) else BROKEN for token, value in pairs]


def check_finite(values: list[float]) -> None:
    """Refuses rows whose largest logit is NaN (any is), infinite, or minus infinity (all are).

    Raises:
        VerificationError: there is such a row.
    """
    if not all(map(math.isfinite, values)):
        raise VerificationError(
            "the model's logits",
            expected="a finite largest logit in each row",
            found=str(values),
            remedy="Run `tilewright verify`; see that not every token is ruled out.",
        )


def _logprobs(logits: Tensor, token: int, count: int | None) -> TokenLogprobs | None:
    if count is None:
        return None
    logprobs = logits.detach().double().log_softmax(-1)
    top = logprobs.topk(min(count, logprobs.shape[-1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprobs(token, float(logprobs[token]), tuple(pairs))

"""How to sample and when to stop, as the user says it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from ..errors import UsageError
from .structured import StructuredOutputsParams


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Attributes:
        temperature: 0 is greedy; else logits are divided by it.
        top_p: keep the fewest tokens that hold this much probability, in (0, 1]; 1 keeps all.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the likeliest one, in [0, 1].
        repetition_penalty: logits of tokens seen in prompt or output are divided (if positive) or
            multiplied (if negative) by it; 1 is none (Keskar et al. 2019, as in Hugging Face).
        presence_penalty: taken off the logits of tokens in the output, in [-2, 2] (OpenAI).
        frequency_penalty: the same, times the token's count in the output, in [-2, 2] (OpenAI).
        logit_bias: by token id a number from -100 to 100 that is added to its logit, before the
            penalties (OpenAI). Kept as a tuple of pairs.
        allowed_token_ids: None, or the only tokens that may be chosen.
        structured_outputs: None, or the form that the output must have. It ends where the form
            does, whatever min_new_tokens and ignore_eos say.
        max_new_tokens: the most tokens to generate, at least 1.
        min_new_tokens: no stop of any kind before this many tokens.
        stop: strings that end the generation; the text is cut before them. A str is one.
        stop_token_ids: tokens that end the generation, beside the model's end-of-sequence tokens.
        ignore_eos: go on past the model's end-of-sequence tokens.
        seed: None for fresh entropy; with a seed the tokens do not depend on the rest of the batch.
        n: how many completions of the prompt.
        logprobs: None, or how many alternatives to report beside each chosen token's logprob.
        prompt_logprobs: None, or how many alternatives to report beside the logprob of each of the
            prompt's tokens. What the prefix cache holds of such a prompt is computed again.
        prompt_logprobs_start: of the prompt's tokens those from this one on, counted from 0, have
            the logprobs that `prompt_logprobs` asks for, and None those before it, which the
            prefix cache may hold.
        cache_ttl: None, or for how many seconds after its last use the prompt is to stay in the
            prefix cache, in full pages. It goes before that only where a request would find no
            memory otherwise.
        cache_namespace: prompts are shared only between requests of the same one: a tenant's name,
            so that nobody learns from times what others have asked.
        priority: whose turn it is: smaller numbers first (vLLM), and those of one number as they
            came. Who waits takes the place of a running request of a larger number.
        deadline: None, or after how many seconds it ends with what there is by then, and before
            others of its priority until then (the earliest deadline first).

    Raises:
        UsageError: a field of the wrong type or out of its range, named with the range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] | None = None
    allowed_token_ids: Iterable[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop: str | Iterable[str] = ()
    stop_token_ids: Iterable[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    cache_ttl: float | None = None
    cache_namespace: str = ""
    priority: int = 0
    deadline: float | None = None

    def __post_init__(self) -> None:
        inf = math.inf
        _check_number(self, "temperature", 0, inf, "a finite number, 0 (greedy) or more")
        _check_number(self, "top_p", math.nextafter(0, 1), 1, "a number above 0, up to 1 (1: off)")
        _check_number(self, "min_p", 0, 1, "a number from 0 (off) to 1")
        _check_number(
            self, "repetition_penalty", math.nextafter(0, 1), inf, "a finite number above 0"
        )
        _check_number(self, "presence_penalty", -2, 2, "a number from -2 to 2")
        _check_number(self, "frequency_penalty", -2, 2, "a number from -2 to 2")
        _check_int(self, "top_k", 0, "an integer, 0 (off) or more")
        _check_int(self, "max_new_tokens", 1, "an integer, 1 or more")
        _check_int(
            self, "min_new_tokens", 0, f"an integer from 0 to max_new_tokens={self.max_new_tokens}"
        )
        _check_int(self, "n", 1, "an integer, 1 or more")
        if self.min_new_tokens > self.max_new_tokens:
            valid = f"an integer from 0 to max_new_tokens={self.max_new_tokens}"
            raise _wrong("min_new_tokens", valid, self.min_new_tokens)
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                _check_int(self, field, 0, "None, or an integer, 0 or more")
        _check_int(self, "prompt_logprobs_start", 0, "an integer, 0 or more")
        if self.seed is not None:
            _check_int(self, "seed", -(2**63), "None, or a 64-bit integer")
            if self.seed >= 2**64:
                raise _wrong("seed", "None, or a 64-bit integer", self.seed)
        if self.cache_ttl is not None:
            _check_number(self, "cache_ttl", 0, inf, "None, or a finite number of seconds")
        if not isinstance(self.cache_namespace, str):
            raise _wrong("cache_namespace", "a string", self.cache_namespace)
        _check_int(self, "priority", -(2**63), "an integer, smaller ones first")
        if self.deadline is not None:
            _check_number(self, "deadline", 0, inf, "None, or a finite number of seconds")
        if not isinstance(self.ignore_eos, bool):
            raise _wrong("ignore_eos", "True or False", self.ignore_eos)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(
            self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids)
        )
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise _wrong(
                    "allowed_token_ids", "None, or at least one id", self.allowed_token_ids
                )
            object.__setattr__(self, "allowed_token_ids", allowed)
        _check_structured(self)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, without repeats."""
        return cast(tuple[str, ...], self.stop)  # __post_init__ made it one

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """(token id, what is added to its logit), one each."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def allowed(self) -> tuple[int, ...] | None:
        """The only tokens that may be chosen; None for all."""
        return cast("tuple[int, ...] | None", self.allowed_token_ids)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether tokens seen before change the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed, other than by temperature and the cuts that follow it."""
        return self.penalises or bool(self.biases) or self.allowed is not None


def _wrong(field: str, valid: str, found: object) -> UsageError:
    return UsageError(
        f"SamplingParams.{field}",
        expected=valid,
        found=repr(found),
        remedy=f"Pass a valid {field}, or leave it out for the default.",
    )


def _check_number(params: SamplingParams, field: str, low: float, high: float, valid: str) -> None:
    value = getattr(params, field)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:  # NaN is not finite
        raise _wrong(field, valid, value)


def _check_int(params: SamplingParams, field: str, low: int, valid: str) -> None:
    value = getattr(params, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise _wrong(field, valid, value)


def _check_structured(params: SamplingParams) -> None:
    form = params.structured_outputs
    if form is not None and not isinstance(form, StructuredOutputsParams):
        raise _wrong("structured_outputs", "None, or a StructuredOutputsParams", form)
    if form is not None and params.allowed is not None:  # they could leave no token
        raise _wrong("allowed_token_ids", "None beside structured_outputs", params.allowed)


def _stop_strings(stop: object) -> tuple[str, ...]:
    valid = "a non-empty string or several of them"
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Iterable):
        raise _wrong("stop", valid, stop)
    strings = tuple(strings)
    if not all(isinstance(one, str) and one for one in strings):
        raise _wrong("stop", valid, stop)
    return tuple(dict.fromkeys(strings))


def _token_ids(field: str, ids: object) -> tuple[int, ...]:
    valid = "a list of token ids, each 0 or more"
    if not isinstance(ids, Iterable) or isinstance(ids, str):
        raise _wrong(field, valid, ids)
    tokens = tuple(ids)
    if not all(_is_token(one) for one in tokens):
        raise _wrong(field, valid, ids)
    return tokens


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _logit_bias(bias: object) -> tuple[tuple[int, float], ...]:
    """Pairs in the order of their tokens, so that equal biases make equal params."""
    valid = "None, or numbers from -100 to 100 by token id"
    if bias is None:
        return ()
    if not isinstance(bias, Iterable) or isinstance(bias, str):
        raise _wrong("logit_bias", valid, bias)
    pairs = tuple(bias.items() if isinstance(bias, Mapping) else bias)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise _wrong("logit_bias", valid, bias)
    for token, value in pairs:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not _is_token(token) or not is_number or not -100 <= value <= 100:  # NaN is neither
            raise _wrong("logit_bias", valid, bias)
    return tuple(sorted(dict(pairs).items()))

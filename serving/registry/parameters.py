"""Sampling parameters of a model's preset: Ollama's names, and what they are here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ...errors import UsageError
from ...runtime.params import SamplingParams

# Ollama's name → the field of SamplingParams.
FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "num_predict": "max_new_tokens",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
CONTEXT = "num_ctx"  # the longest sequence, for which a model is compiled
NAMES = (*FIELDS, CONTEXT)
_COUNTS = ("top_k", "seed", "num_predict", CONTEXT)


def check_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that may be kept with a model.

    Raises:
        UsageError: a name that means nothing here, or a value out of its range.
    """
    found = dict(given)
    for name, value in found.items():
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1)
            raise UsageError(
                f"parameter {name[:40]!r}",
                expected=f"one of {', '.join(NAMES)}",
                found=name[:40],
                remedy=f"Write {close[0]!r}." if close else "Leave it out.",
            )
        if name == "stop":
            found[name] = [value] if isinstance(value, str) else value
        _check_type(name, found[name])
    if isinstance(length := found.get(CONTEXT), int) and length < 1:
        raise _wrong(CONTEXT, "a number of tokens above 0", length)
    sampling_fields(found)
    return found


def sampling_fields(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams` that they set.

    Raises:
        UsageError: a value out of its range.
    """
    fields = {FIELDS[name]: value for name, value in parameters.items() if name in FIELDS}
    if fields.get("max_new_tokens", 1) < 1:  # Ollama's -1 and -2: as many as there is room for
        del fields["max_new_tokens"]
    if fields.get("top_p") == 0:
        fields["top_p"] = 1e-9  # the likeliest alone
    SamplingParams(**fields)
    return fields


def _check_type(name: str, value: object) -> None:
    if name == "stop":
        if not isinstance(value, list) or not all(isinstance(x, str) and x for x in value):
            raise _wrong(name, "a text, or a list of texts", value)
    elif isinstance(value, bool) or not isinstance(value, int if name in _COUNTS else int | float):
        raise _wrong(name, "a whole number" if name in _COUNTS else "a number", value)


def _wrong(name: str, expected: str, value: object) -> UsageError:
    return UsageError(
        f"parameter {name!r}",
        expected=expected,
        found=repr(value)[:80],
        remedy="Correct it, or leave it out.",
    )

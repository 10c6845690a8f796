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
# As requests have them, or a preset could do what a request may not: fail a step for others.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "seed": (-(2**63), 2**64 - 1),
    "num_predict": (-2, 2**31 - 1),
    "repeat_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    CONTEXT: (1, 2**31 - 1),
}
_MOST_STOPS, _LONGEST_STOP = 64, 1024


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
        _check_value(name, found[name])
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


def _check_value(name: str, value: object) -> None:
    if name == "stop":
        if not isinstance(value, list) or not all(isinstance(x, str) and x for x in value):
            raise _wrong(name, "a text, or a list of texts", value)
        if len(value) > _MOST_STOPS or any(len(text) > _LONGEST_STOP for text in value):
            most = f"up to {_MOST_STOPS} texts of up to {_LONGEST_STOP} characters"
            raise _wrong(name, most, f"{len(value)}, the longest of {max(map(len, value))}")
        return
    kind = "a whole number" if name in _COUNTS else "a number"
    if isinstance(value, bool) or not isinstance(value, int if name in _COUNTS else int | float):
        raise _wrong(name, kind, value)
    least, greatest = _RANGES[name]
    if not least <= value <= greatest:  # nor NaN
        raise _wrong(name, f"{kind} from {least} to {greatest}", value)


def _wrong(name: str, expected: str, value: object) -> UsageError:
    return UsageError(
        f"parameter {name!r}",
        expected=expected,
        found=repr(value)[:80],
        remedy="Correct it, or leave it out.",
    )

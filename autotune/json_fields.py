"""Strict reading of JSON objects: every member known, none missing, each of its type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError


def read_fields(data: object, culprit: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The members of an object that has exactly these.

    Args:
        data: what `json` read.
        culprit: what the object is, for the error.
        kinds: the exact type of each member; a whole number also counts as a float. `object`:
            any type.

    Raises:
        UsageError: data of another shape.
    """
    if not isinstance(data, dict):
        raise damaged(culprit, "a JSON object", type(data).__name__)
    if set(data) != set(kinds):
        raise damaged(culprit, f"the members {', '.join(kinds)}", ", ".join(map(str, data)))
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        value = data[name]
        if kind is float and type(value) is int:
            value = float(value)
        if kind is not object and type(value) is not kind:
            raise damaged(f"{culprit}: {name}", kind.__name__, repr(value))
        found[name] = value
    return found


def damaged(culprit: str, expected: str, found: str) -> UsageError:
    """The error of stored data that is not what it should be."""
    remedy = "Tune again, or take the record from where it was made."
    return UsageError(culprit, expected=expected, found=found, remedy=remedy)

"""One setting of a kernel's parameters, as plain values that JSON can hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import UsageError

Value = int | float | bool | str | None
"""What a parameter may be set to. Exactly these types: a subclass would not survive JSON."""

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_.+-]*")
_JSON_WORDS = frozenset({"true", "false", "null", "NaN", "Infinity"})


@dataclass(frozen=True, slots=True)
class Config:
    """Names and values, in the order of the space they belong to.

    Configs have no order of their own: `Space.index` gives the canonical one.

    Attributes:
        values: (name, value) pairs.

    Raises:
        UsageError: a name twice, or a value that JSON cannot hold.
    """

    values: tuple[tuple[str, Value], ...]

    def __post_init__(self) -> None:
        if len({name for name, _ in self.values}) != len(self.values):
            raise _misuse("each name once", str([name for name, _ in self.values]))
        for name, value in self.values:
            if not is_plain(value):
                raise _misuse("values that JSON can hold", f"{name}={value!r}")

    @classmethod
    def of(cls, mapping: Mapping[str, Value], names: Iterable[str]) -> Config:
        """The config of a mapping, in the order of `names`.

        Raises:
            UsageError: the mapping has other names than these.
        """
        order = tuple(names)
        if set(order) != set(mapping):
            raise _misuse(f"the names {', '.join(order)}", ", ".join(map(str, mapping)) or "none")
        return cls(tuple((name, mapping[name]) for name in order))

    @classmethod
    def from_json(cls, data: object) -> Config:
        """The config of an object that `to_json` gave.

        Raises:
            UsageError: not a JSON object of plain values.
        """
        if not isinstance(data, dict):
            raise _misuse("a JSON object", repr(data))
        return cls(tuple(data.items()))

    def to_json(self) -> dict[str, Value]:
        """A JSON object, its members in the order of the space."""
        return dict(self.values)

    def as_dict(self) -> dict[str, Value]:
        """A new dict of the values by name."""
        return dict(self.values)

    def get(self, name: str, default: Value = None) -> Value:
        """The value of a name, or `default` where there is no such name."""
        return next((value for key, value in self.values if key == name), default)

    def __getitem__(self, name: str) -> Value:
        """The value of a name.

        Raises:
            KeyError: there is no such name.
        """
        for key, value in self.values:
            if key == name:
                return value
        raise KeyError(name)

    def __str__(self) -> str:
        """The canonical text, `block_m=64 num_warps=4`: two configs differ where it does."""
        return " ".join(f"{name}={spelled(value)}" for name, value in self.values)


def spelled(value: Value) -> str:
    """A value as JSON spells it; a string that cannot be mistaken goes without quotes."""
    if isinstance(value, str) and _BARE.fullmatch(value) and value not in _JSON_WORDS:
        return value
    return json.dumps(value)


def is_plain(value: object) -> bool:
    """Whether JSON (and with it each of Optuna's storages) holds the value and gives it back."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is str:
        return not any("\ud800" <= letter <= "\udfff" for letter in value)
    return value is None or type(value) in (int, bool)


def _misuse(expected: str, found: str) -> UsageError:
    return UsageError(
        "config",
        expected=expected,
        found=found,
        remedy="Make configs with Config.of, from the names of their space.",
    )

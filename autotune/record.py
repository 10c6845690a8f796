"""One line of a tuning store: what was chosen, what it was chosen from, and how it was found."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .config import Config
from .json_fields import damaged, read_fields
from .key import Conditions, Key

FORMAT = 1
_WHAT = "tuning record"
_KINDS: dict[str, type] = {
    "format": int,
    "key": dict,
    "conditions": dict,
    "config": dict,
    "seconds": float,
    "default": dict,
    "default_seconds": float,
    "numerics": str,
    "runners_up": list,
    "failed": list,
    "trials": int,
    "seed": int,
    "budget": str,
    "made": str,
}

Identity = tuple[Key, Conditions]


@dataclass(frozen=True, slots=True)
class Record:
    """The outcome of tuning one kernel for one problem on one device.

    Attributes:
        key, conditions: what it is valid for, and under what it was measured.
        config: the choice.
        seconds: its median time.
        default: the config of the untuned kernel.
        default_seconds: its median time, measured interleaved with the choice.
        numerics: class of the choice: what decides the order in which it adds.
        runners_up: (config, median seconds) of the next best, fastest first.
        failed: (config, reason) of those that could not be chosen.
        trials: configs that were measured.
        seed: of the sampler.
        budget: effort or limits, in words.
        made: date and time in ISO 8601; taken as UTC where it names no zone.

    Raises:
        UsageError: a time that is not finite and positive, trials below 0, or no date.
    """

    key: Key
    conditions: Conditions
    config: Config
    seconds: float
    default: Config
    default_seconds: float
    numerics: str
    runners_up: tuple[tuple[Config, float], ...]
    failed: tuple[tuple[Config, str], ...]
    trials: int
    seed: int
    budget: str
    made: str

    def __post_init__(self) -> None:
        times = (self.seconds, self.default_seconds, *(time for _, time in self.runners_up))
        for time in times:
            if not 0 < time < math.inf:
                raise damaged(_WHAT, "finite positive seconds", str(time))
        if self.trials < 0:
            raise damaged(_WHAT, "trials from 0", str(self.trials))
        try:
            _ = self.when
        except (ValueError, OverflowError) as error:
            raise damaged(_WHAT, "a date in ISO 8601", repr(self.made)) from error

    @property
    def when(self) -> datetime:
        """`made`, in UTC."""
        when = datetime.fromisoformat(self.made)
        return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)

    @property
    def identity(self) -> Identity:
        """Key and conditions: a store uses one record for each."""
        return self.key, self.conditions

    def to_json(self) -> dict[str, Any]:
        """Plain data that `json` writes."""
        return {
            "format": FORMAT,
            "key": self.key.to_json(),
            "conditions": self.conditions.to_json(),
            "config": self.config.to_json(),
            "seconds": self.seconds,
            "default": self.default.to_json(),
            "default_seconds": self.default_seconds,
            "numerics": self.numerics,
            "runners_up": [{"config": c.to_json(), "seconds": s} for c, s in self.runners_up],
            "failed": [{"config": c.to_json(), "reason": r} for c, r in self.failed],
            "trials": self.trials,
            "seed": self.seed,
            "budget": self.budget,
            "made": self.made,
        }

    @classmethod
    def from_json(cls, data: object) -> Record:
        """The record of an object that `to_json` gave.

        Raises:
            UsageError: data of another shape or another format.
        """
        found = read_fields(data, _WHAT, _KINDS)
        if (version := found.pop("format")) != FORMAT:
            raise damaged(f"{_WHAT}: format", str(FORMAT), str(version))
        found |= {
            "key": Key.from_json(found["key"]),
            "conditions": Conditions.from_json(found["conditions"]),
            "config": Config.from_json(found["config"]),
            "default": Config.from_json(found["default"]),
            "runners_up": _pairs(found["runners_up"], "seconds", float),
            "failed": _pairs(found["failed"], "reason", str),
        }
        return cls(**found)

    @property
    def line(self) -> str:
        """The record as one line of ASCII, without its end: equal records have equal lines."""
        return json.dumps(self.to_json(), allow_nan=False)


def _pairs(data: list[Any], name: str, kind: type) -> tuple[tuple[Config, Any], ...]:
    parts = [read_fields(part, _WHAT, {"config": dict, name: kind}) for part in data]
    return tuple((Config.from_json(part["config"]), part[name]) for part in parts)

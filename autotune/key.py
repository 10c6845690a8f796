"""What a tuning record is valid for: the key, every field with its reason, and the conditions.

The key is what a choice of config depends on. The conditions are what may move the measurements a
little: they are kept beside it and matched by policy (lookup.py), so that a new driver does not
throw away what is known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from ..errors import UsageError
from .json_fields import read_fields

Problem = tuple[tuple[str, str | int], ...]

TOKEN_BUCKETS = tuple(1 << exponent for exponent in range(14))  # 1 to 8192


def _because(reason: str) -> Any:
    return field(metadata={"reason": reason})


@dataclass(frozen=True, slots=True)
class Key:
    """All that the best config depends on. The metadata of each field say why it is here.

    Attributes:
        template: name of the kernel template.
        template_hash: `normalised_ast_hash` of its source.
        space_hash: `Space.digest`.
        problem: (name, value) pairs, kept sorted by name: the bucketed sizes, which are ints
            from 0, and dtypes, layout and quantization, which are text.
        device: the target, as `str(Target)` has it.
        arch: compute capability as a number, 90 for sm_90.

    Raises:
        UsageError: a name twice in `problem`, or a value that is neither text nor an int from 0.
    """

    template: str = _because("each template has its own parameters")
    template_hash: str = _because("another kernel body runs at another speed")
    space_hash: str = _because("a config of another space may not exist, or mean something else")
    problem: Problem = _because("sizes, dtypes, layout and quantization decide what is fast")
    device: str = _because("devices differ in units, caches and bandwidth")
    arch: int = _because("another architecture gets other instructions")

    def __post_init__(self) -> None:
        names = [name for name, _ in self.problem]
        if len(set(names)) != len(names):
            raise _misuse("each name once in the problem", str(names))
        for name, value in self.problem:
            if not (type(value) is str or (type(value) is int and value >= 0)):
                raise _misuse("text and ints from 0 in the problem", f"{name}={value!r}")
        object.__setattr__(self, "problem", tuple(sorted(self.problem)))

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all fields."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: Key) -> tuple[str, ...]:
        """The names of the fields that differ; of the problem each one, as `problem.tokens`."""
        found: list[str] = []
        for name in _names():
            if getattr(self, name) == getattr(other, name):
                continue
            if name == "problem":
                mine, theirs = dict(self.problem), dict(other.problem)
                parts = sorted(mine.keys() | theirs.keys())
                found += [f"problem.{p}" for p in parts if mine.get(p) != theirs.get(p)]
            else:
                found.append(name)
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the problem is an object within it."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**plain, "problem": dict(self.problem)}

    @classmethod
    def from_json(cls, data: object) -> Key:
        """The key of an object that `to_json` gave.

        Raises:
            UsageError: data of another shape.
        """
        kinds = dict.fromkeys((f.name for f in fields(cls)), str)
        found = read_fields(data, "tuning key", {**kinds, "problem": dict, "arch": int})
        return cls(**{**found, "problem": tuple(found["problem"].items())})

    def __str__(self) -> str:
        """A line for people: template, problem, device; no hashes."""
        problem = " ".join(f"{name}={value}" for name, value in self.problem)
        return f"{self.template} [{problem}] on {self.device}"


@cache
def _names() -> tuple[str, ...]:
    return tuple(f.name for f in fields(Key))


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under what a record was measured, or is looked up.

    Attributes:
        triton: its version.
        driver: version of the device's driver; None: not known, as where an engine is compiled
            without the device. It then differs from none.
        version: our own.
        libraries: versions of what else was measured, "onnxruntime 1.26.0, torch 2.13.0"; "" for
            kernels, where there is nothing else.
    """

    triton: str = _because("another compiler may schedule the same kernel otherwise")
    driver: str | None = _because("the driver assembles, loads and launches")
    version: str = _because("our launchers and lowering change with us")
    libraries: str = field(
        default="", metadata={"reason": "another release of a library runs at another speed"}
    )

    def differences(self, other: Conditions) -> tuple[str, ...]:
        """The names of the fields that differ."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        unknown = (None,)
        return tuple(
            name
            for name, mine, theirs in pairs
            if mine != theirs and mine not in unknown and theirs not in unknown
        )

    def to_json(self) -> dict[str, str | None]:
        """A JSON object; without `libraries` where there are none."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        if not self.libraries:
            del plain["libraries"]
        return plain

    @classmethod
    def from_json(cls, data: object) -> Conditions:
        """The conditions of an object that `to_json` gave.

        Raises:
            UsageError: data of another shape.
        """
        kinds: dict[str, type] = {"triton": str, "driver": object, "version": str}
        if isinstance(data, dict) and "libraries" in data:
            kinds["libraries"] = str
        found = read_fields(data, "tuning conditions", kinds)
        if found["driver"] is not None:
            read_fields({"driver": found["driver"]}, "tuning conditions", {"driver": str})
        return cls(**found)


def reason_of(name: str) -> str:
    """Why a field, as `differences` names it, matters.

    Raises:
        KeyError: neither keys nor conditions have such a field.
    """
    reasons = {f.name: f.metadata["reason"] for f in (*fields(Key), *fields(Conditions))}
    return str(reasons[name.partition(".")[0]])


def bucket(n: int, sizes: Sequence[int]) -> int:
    """The smallest of `sizes` that holds `n`; the largest where none does.

    Args:
        n: 1 or more.
        sizes: ascending.

    Raises:
        UsageError: `n` is below 1.
    """
    if n < 1:
        raise UsageError(
            "size", expected="1 or more", found=str(n), remedy="Leave out empty problems."
        )
    return next((size for size in sizes if size >= n), sizes[-1])


def token_bucket(n: int) -> int:
    """The power of two that a number of tokens is tuned as: the next one up, 8192 at most.

    The worst case. Let b be the bucket, so that b/2 < n <= b. A config's time grows with n, so
    that at n it takes no longer than at b, where it is the best. And b tokens can always be served
    as two launches of b/2, so that the best at b takes at most twice the best at b/2, which takes
    no longer than the best at n. The bucket's config is therefore at most twice as slow as the
    best, and that only where time is proportional to tokens and n is just above b/2; decode is
    bound by the weights, and there the two differ little. Above 8192 the same holds of n cut into
    pieces. What it is in practice is measured by the benchmark of the tuner.

    Raises:
        UsageError: `n` is below 1.
    """
    return bucket(n, TOKEN_BUCKETS)


def _misuse(expected: str, found: str) -> UsageError:
    remedy = "Correct the template that makes the key."
    return UsageError("tuning key", expected=expected, found=found, remedy=remedy)

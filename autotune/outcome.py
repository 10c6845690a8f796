"""What became of a candidate: its times, or the reason why it has none."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from ..errors import UsageError
from .config import Config

Status = Literal["ok", "refused", "failed", "wrong", "crashed", "hung", "out_of_memory", "too_slow"]
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True)
class Outcome:
    """One candidate, after it was tried.

    Attributes:
        config: what was tried.
        status: "ok" where it is correct and was timed: also one that was stopped early, as slower
            than the best; `reason` says so then. "refused" was never run, "too_slow" only once.
        reason: in words; empty for what ran to its end.
        seconds: of each round.
        error: the largest error as a multiple of the tolerance; None: never compared.
        reference: seconds of the reference in the same rounds, one for one; empty for itself.
        facts: what the runner tells of the device: clocks, temperature.
        digest: of the binary, where it was compiled.
        stopped: whether the sequential test stopped it before its last round.
    """

    config: Config
    status: Status
    reason: str = ""
    seconds: tuple[float, ...] = ()
    error: float | None = None
    reference: tuple[float, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    stopped: bool = False

    @property
    def ok(self) -> bool:
        """Whether it is correct and has times."""
        return self.status == "ok"

    @property
    def median(self) -> float | None:
        """The median of its times, in seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def ratio(self) -> float | None:
        """Its time over the reference's in the same rounds (median); 1 for the reference."""
        if not self.seconds:
            return None
        return math.exp(statistics.median(self.log_ratios))

    @property
    def log_ratios(self) -> tuple[float, ...]:
        """The logarithm of its time over the reference's, round by round."""
        if not self.reference:
            return (0.0,) * len(self.seconds)
        return tuple(float(x) for x in np.log(self.seconds) - np.log(self.reference))

    def to_json(self) -> dict[str, Any]:
        """Plain data that `json` writes; an error that is not finite is written as text."""
        error = self.error
        return {
            "config": self.config.to_json(),
            "status": self.status,
            "reason": self.reason,
            "seconds": list(self.seconds),
            "error": error if error is None or math.isfinite(error) else str(error),
            "reference": list(self.reference),
            "facts": dict(self.facts),
            "digest": self.digest,
            "stopped": self.stopped,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """The outcome that `to_json` gave.

        Raises:
            UsageError: data of another shape.
        """
        try:
            if data["status"] not in STATUSES:
                raise ValueError(f"status {data['status']!r}")
            return cls(
                config=Config.from_json(data["config"]),
                status=data["status"],
                reason=str(data["reason"]),
                seconds=tuple(float(s) for s in data["seconds"]),
                error=None if data["error"] is None else float(data["error"]),
                reference=tuple(float(s) for s in data["reference"]),
                facts=dict(data["facts"]),
                digest=str(data["digest"]),
                stopped=bool(data["stopped"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                "outcome",
                expected="what Outcome.to_json gives",
                found=repr(error),
                remedy="Start the study anew.",
            ) from error


class CandidateError(Exception):
    """A config that failed, as its worker or its end told it; caught by those who measure.

    Args:
        status: what it is marked with.
        reason: in words.
        breaks: whether the worker cannot be trusted any more: it is dead, or something was
            launched that went wrong.
    """

    def __init__(self, status: Status, reason: str, *, breaks: bool) -> None:
        super().__init__(reason)
        self.status, self.reason, self.breaks = status, reason, breaks

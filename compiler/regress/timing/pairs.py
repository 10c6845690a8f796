"""What a suite times, and the process that does it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ....errors import EngineError, UsageError
from ..checkout import Checkout
from .worker import Answer, Worker

Pair = tuple[float, float]
_MOST_WHY = 500
_TIME = re.compile(r"(.*)/time \((.*)\)")
PHASE_SUBJECTS = {"ttft": "prefill", "itl": "decode step", "throughput": "serving loop"}
"""By the first word of a phase: what a report blames."""


@dataclass(frozen=True, slots=True)
class EnginePair:
    """One case, compiled by old and by new.

    Attributes:
        case, target: of the suite.
        owner: who is to be asked.
        old, new: engine folders.
        kernels, phases: what of it is timed.
    """

    case: str
    target: str
    owner: str
    old: str
    new: str
    kernels: bool = True
    phases: bool = True


@dataclass(frozen=True, slots=True)
class TimedSeries:
    """What one series is.

    Attributes:
        pair: whose.
        subject: the kernel, or the phase.
        series: what of it: "time (decode b1)", "ttft".
        unit, better: of its values.
    """

    pair: EnginePair
    subject: str
    series: str
    unit: str = "s"
    better: Literal["lower", "higher"] = "lower"

    @property
    def name(self) -> str:
        """What tells it from all others."""
        return f"{self.pair.case}.{self.pair.target}/{self.subject}/{self.series}"


class TimedPairs:
    """A process that holds old and new of all pairs, each with its own code.

    Args:
        pairs: what to time.
        old, new: the checkouts.
        seed: of every order that is drawn.
        only: series to time, all if empty.

    Attributes:
        series: by name.
        skipped: series that cannot be timed, with the reason.
        device: what the process found.

    Raises:
        EngineError: the process cannot set itself up.
        UsageError: nothing is to be timed.
    """

    def __init__(
        self,
        pairs: Sequence[EnginePair],
        old: Checkout,
        new: Checkout,
        seed: int = 0,
        only: Sequence[str] = (),
    ) -> None:
        job = {
            "old_code": str(old.root),
            "seed": seed,
            "pairs": [_job(pair, only) for pair in pairs],
        }
        self._worker = Worker(new, "compiler.regress.timing.measure", json.dumps(job))
        try:
            self._enter(self._worker.start(), pairs, only)
        except BaseException:
            self.close()
            raise

    def _enter(self, ready: Answer, pairs: Sequence[EnginePair], only: Sequence[str]) -> None:
        """Takes down what the process is ready to time."""
        found = {key: _series(key, pairs) for key in (*ready["kernels"], *ready["phases"])}
        self._keys = {s.name: key for key, s in found.items() if not only or s.name in only}
        self.series: Mapping[str, TimedSeries] = {n: found[key] for n, key in self._keys.items()}
        self.skipped = {_series(k, pairs).name: text for k, text in ready["skipped"].items()}
        self.device: Mapping[str, Any] = ready["device"]
        if not self.series:
            why = "; ".join(f"{name}: {text}" for name, text in self.skipped.items())
            raise UsageError(
                "the suite",
                expected='a model with timed = ["kernels", "phases"] for this device',
                found=f"nothing to time{f' ({why[:_MOST_WHY]})' if why else ''}",
                remedy="Add one to the suite.",
            )

    def measure(self, names: Sequence[str]) -> dict[str, Pair]:
        """One (old, new) pair of each series named.

        Raises:
            EngineError: the process ends, or cannot time one of them.
        """
        for name in names:
            if name not in self._keys:
                raise EngineError(
                    f"series {name}",
                    expected="a kernel or phase that this process times, as the one before it did",
                    found=self.skipped.get(name, "none of that name"),
                    remedy="Run the comparison again.",
                )
        asked = {self._keys[name]: name for name in names}
        pairs = self._worker.ask({"measure": list(asked)})["pairs"]
        return {asked[key]: (old, new) for key, (old, new) in pairs.items()}

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()

    def __enter__(self) -> TimedPairs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _job(pair: EnginePair, only: Sequence[str]) -> dict[str, object]:
    """What the process is told of a pair; ``only`` are names of series."""
    head = f"{pair.case}.{pair.target}/"
    mine = [name.removeprefix(head) for name in only if name.startswith(head)]
    kernels = [found.expand(r"\1 @ \2") for n in mine if (found := _TIME.fullmatch(n))]
    return {
        "old": pair.old,
        "new": pair.new,
        "kernels": pair.kernels and (not only or bool(kernels)),
        "phases": pair.phases and (not only or len(mine) > len(kernels)),
        "only": kernels,
    }


def _series(key: str, pairs: Sequence[EnginePair]) -> TimedSeries:
    index, _, name = key.partition("/")
    pair = pairs[int(index)]
    subject, kernel, setting = name.partition(" @ ")
    if kernel:
        return TimedSeries(pair, subject, f"time ({setting})")
    phase, _, batch = name.partition(" ")
    subject, series = PHASE_SUBJECTS[phase], f"{phase} ({batch})" if batch else phase
    if phase == "throughput":
        return TimedSeries(pair, subject, series, "tok/s", "higher")
    return TimedSeries(pair, subject, series)

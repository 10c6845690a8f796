"""How much is spent on tuning: a table, and what a user may set instead of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import UsageError
from .space import Space


@dataclass(frozen=True, slots=True)
class Effort:
    """What may be spent on one key.

    Attributes:
        name: of the row, and what a budget changed of it.
        candidates: that are a function of the key alone: the default, what is always tried, the
            neighbours' winners, the prior's best.
        share: of the valid configs that these may be; `LEAST` are allowed always.
        trials: candidates in all; what goes beyond `candidates` is drawn by a sampler.
        rounds: of a candidate that is not stopped.
        finalists: that are timed again, interleaved.
        band, leave, looks: of the decision (decide.py): wide bands give the same choice again,
            narrow ones and more rounds the fastest.
        seconds: of search and decision; a bound, which no usual run meets: what stops by the clock
            depends on noise.
    """

    name: str
    candidates: int = 0
    share: float = 1.0
    trials: int = 0
    rounds: int = 8
    finalists: int = 10
    band: tuple[float, float] = (0.01, 0.02)
    leave: tuple[float, float] = (0.03, 0.04)
    looks: tuple[int, ...] = (12, 20, 32, 48)
    seconds: float = 0.0

    @property
    def measures(self) -> bool:
        """Whether anything is measured at all."""
        return self.trials > 0 and self.seconds > 0

    def limited(self, trials: int | None = None, seconds: float | None = None) -> Effort:
        """This effort within a budget of `TuneConfig`'s meaning; all else stays as it is.

        The seconds are for all keys together: whoever tunes several keeps that deadline. Zero of
        either: nothing is measured.
        """
        if trials is None and seconds is None:
            return self
        parts = [self.name]
        parts += [] if trials is None else [f"{trials} trials"]
        parts += [] if seconds is None else [f"{seconds:g} s"]
        return replace(
            self,
            name=", ".join(parts),
            trials=self.trials if trials is None else trials,
            seconds=self.seconds if seconds is None else min(self.seconds, seconds),
        )

    def allowed(self, space: Space) -> int:
        """How many candidates are a function of the key alone, in this space."""
        within = max(LEAST, math.floor(self.share * space.count()))
        return min(self.candidates, self.trials, within)


LEAST = 4
"""Candidates that the smallest space gets: the default and a few others."""

EXHAUSTIVE_BELOW = 200
"""Valid configs below which all of them are tried, instead of drawing some."""

EFFORTS: dict[str, Effort] = {
    "none": Effort("none"),
    "cached": Effort("cached"),
    "quick": Effort("quick", candidates=24, share=0.1, trials=24, seconds=60.0),
    "full": Effort(
        "full",
        candidates=48,
        trials=400,
        rounds=12,
        finalists=12,
        band=(0.003, 0.008),
        leave=(0.03, 0.03),
        looks=(12, 20, 32, 48, 72, 96),
        seconds=900.0,
    ),
}


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """A budget of the user's own, for `compile`; all that it does not say is as in "full".

    `tilewright tune --trials --seconds` means the same, over any effort. At zero of either nothing
    is measured, and the defaults stay.

    Attributes:
        trials: candidates of each problem at most.
        seconds: for all problems together. What is not reached is left as it is, and what is cut
            short is taken up by the next run.
        storage: of Optuna, as `study.open_storage` takes it; None: memory.
        seed: of the sampler.

    Raises:
        UsageError: a negative number.
    """

    trials: int | None = None
    seconds: float | None = None
    storage: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("trials", "seconds"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise UsageError(
                    name,
                    expected="a number from 0; at 0 nothing is measured",
                    found=str(value),
                    remedy=f"Leave {name} out to have that of the effort.",
                )


def effort_of(tune: str | TuneConfig) -> Effort:
    """The effort that the `tune` argument of `compile` asks for.

    Raises:
        UsageError: an unknown name.
    """
    if isinstance(tune, TuneConfig):
        return EFFORTS["full"].limited(tune.trials, tune.seconds)
    if tune not in EFFORTS:
        raise UsageError(
            "tune",
            expected=f"one of {', '.join(EFFORTS)}, or a TuneConfig",
            found=repr(tune),
            remedy="quick is a good start.",
        )
    return EFFORTS[tune]

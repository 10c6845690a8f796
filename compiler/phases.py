"""The phases of a compile: their seconds, and who wants to hear of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[str, float], None]
"""Called with a phase's name and its share of the whole, 0 to 1."""


@dataclass(slots=True)
class Phases:
    """Seconds of each phase, and who wants to hear of them."""

    progress: Progress | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, share: float, work: Callable[[], T]) -> T:
        """Does ``work`` as phase ``name``, which starts when ``share`` of the whole is done."""
        if self.progress is not None:
            self.progress(name, share)
        started = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - started
        return result

    def within(self, name: str, start: float, stop: float) -> Callable[[float], None]:
        """What takes the share of phase ``name`` that is done, for work of minutes."""

        def advance(share: float) -> None:
            if self.progress is not None:
                self.progress(name, start + share * (stop - start))

        return advance

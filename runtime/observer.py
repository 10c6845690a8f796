"""Who watches a loop (metrics, traces, benchmarks), and who works beside its scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .plan import Chunk
from .request import Request


class Observer(Protocol):
    """Is told what a loop does, by whoever runs the step, while that holds the loop's lock.

    Whether a request has ended, and when its tokens came, is to be seen in the request itself.
    """

    def added(self, request: Request) -> None:
        """A request was queued."""
        ...

    def stepped(self, chunks: Sequence[Chunk], started: float, ended: float) -> None:
        """A step was computed, and its tokens went to their sequences.

        Args:
            chunks: what was computed of sequences that waited for it.
            started: when it was planned, in seconds of the loop's clock.
            ended: when its tokens had been taken.
        """
        ...


class Guest(Protocol):
    """Work with a loop's executor and memory that its scheduler does not plan."""

    def advance(self) -> None:
        """One step of it, behind each of the loop's own, by whoever runs that, under the lock.

        What it raises is not for the loop's requests, and is an interrupt.
        """
        ...

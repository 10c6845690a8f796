"""A load on a generation loop, in this process and this thread.

The loop is open: requests arrive when they are due, whether or not those before have ended. One
that becomes due while a step runs is handed over behind that step, and counts from when it was due,
so that no waiting is left out. Only turns of a conversation wait, for the answer before; and where
`concurrency` is limited, the client holds requests back as `vllm bench serve` does, and they count
from when they are sent.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import CapacityError, UsageError
from ...runtime.loop import GenerationLoop
from ...runtime.output import Completion
from ...runtime.params import SamplingParams
from ...runtime.request import Request
from .workloads import Conversation


@dataclass(frozen=True, slots=True)
class Load:
    """What came of a load.

    Attributes:
        started: in seconds of the loop's clock.
        done: of those that ended, in the order in which they did.
        failed: why the others could not be taken.
    """

    started: float
    done: tuple[Completion, ...]
    failed: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """From the start to the last token."""
        ends = (one.timings.submitted + one.timings.e2e for one in self.done)
        return max(ends, default=self.started) - self.started

    @property
    def most_at_once(self) -> int:
        """The most requests that had been sent and had not ended; one that ends when another is
        sent is not counted with it.
        """
        events = sorted(
            event
            for one in self.done
            for event in (
                (one.timings.submitted, 1),
                (one.timings.submitted + one.timings.e2e, -1),
            )
        )
        most = now = 0
        for _, change in events:
            now += change
            most = max(most, now)
        return most


@dataclass(order=True, slots=True)
class _Due:
    """A turn that waits for its time; those of one time go in their order."""

    at: float
    order: int
    turns: Conversation
    history: list[int]


@dataclass(slots=True)
class _Sent:
    """A turn that was sent, and those that follow it."""

    request: Request
    turns: Conversation


class LoadDriver:
    """Hands requests over when they are due, and runs the loop's steps in between.

    Args:
        loop: with nothing in it.
        concurrency: the most requests at once, None for no limit.
        think: seconds between an answer and the next turn.
        wait: until a time of the loop's clock, when there is nothing to do.
        advance: told how many requests are over, after each that is.
    """

    def __init__(
        self,
        loop: GenerationLoop,
        *,
        concurrency: int | None = None,
        think: float = 0.0,
        wait: Callable[[float], None] | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        self._loop, self._think, self._advance = loop, think, advance
        self._wait = wait or self._sleep
        # When each of the client's places came free.
        self._places = None if concurrency is None else [-math.inf] * concurrency
        self._due: list[_Due] = []
        self._sent: list[_Sent] = []
        self._done: list[Completion] = []
        self._failed: list[str] = []
        self._order = 0

    def run(self, conversations: Sequence[Conversation], arrivals: Sequence[float]) -> Load:
        """Runs all of them.

        Args:
            conversations: at least one.
            arrivals: when each begins, in seconds from now.
        """
        started = self._loop.clock()
        for turns, at in zip(conversations, arrivals, strict=True):
            self._push(started + at, turns, [])
        try:
            while self._due or self._sent:
                self._send()
                if self._sent:
                    self._loop.step()
                    self._collect()
                elif self._due:
                    self._wait(self._due[0].at)
        finally:
            for one in self._sent:
                self._loop.cancel(one.request)
        return Load(started, tuple(self._done), tuple(self._failed))

    def _push(self, at: float, turns: Conversation, history: list[int]) -> None:
        heapq.heappush(self._due, _Due(at, self._order, turns, history))
        self._order += 1

    def _send(self) -> None:
        now = self._loop.clock()
        while self._due and self._due[0].at <= now and self._places != []:
            due = heapq.heappop(self._due)
            at = due.at if self._places is None else max(due.at, heapq.heappop(self._places))
            turn, *others = due.turns
            params = SamplingParams(max_new_tokens=turn.output_tokens, ignore_eos=True)
            try:
                request = self._loop.submit(due.history + turn.tokens, params, submitted=at)
            except (UsageError, CapacityError) as error:  # of this prompt; others go on
                self._failed += [str(error)] * len(due.turns)
                self._free(at)
                continue
            self._sent.append(_Sent(request, tuple(others)))

    def _collect(self) -> None:
        going: list[_Sent] = []
        for one in self._sent:
            # A client is no part of the host's work that is measured: one look at each.
            if one.request.sequences[0].finish_reason is None:
                going.append(one)
                continue
            (completion,) = one.request.completions()
            self._done.append(completion)
            end = completion.timings.submitted + completion.timings.e2e
            self._free(end)
            if one.turns:
                history = one.request.prompt + completion.token_ids
                self._push(end + self._think, one.turns, history)
        if len(going) < len(self._sent):
            self._sent = going
            self._advance(len(self._done) + len(self._failed))

    def _free(self, at: float) -> None:
        if self._places is not None:
            heapq.heappush(self._places, at)

    def _sleep(self, until: float) -> None:
        time.sleep(max(0.0, until - self._loop.clock()))

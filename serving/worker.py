"""The thread that runs an engine's steps for the coroutines of an event loop.

The path of a request: a coroutine checks the prompt and compiles its form
(`GenerationLoop.prepare`), on a thread of its own if that may take long, so that nobody waits for
it. `Worker.submit` puts the request into the inbox. The worker takes what is in the inbox between
two steps, and hands what a step added to all streams to the event loop in one call. Closing a
stream puts a cancellation into the inbox.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from ..errors import CapacityError, TilewrightError
from ..runtime.loop import GenerationLoop
from ..runtime.output import Completion, Delta
from ..runtime.params import SamplingParams
from ..runtime.request import Request

log = logging.getLogger(__name__)

_SHORT = 1024  # tokens: checking them takes 0.1 ms, as a thread does that finds nobody else busy


class QueueFull(CapacityError):
    """More requests than the server holds at once."""


@dataclass(slots=True)
class _Event:
    """What one step did for one stream; the last one has completions, or an error."""

    deltas: list[Delta] = field(default_factory=list)
    completions: list[Completion] | None = None
    error: Exception | None = None


class Stream:
    """One request as it is answered. `completions` are there once the iteration has ended."""

    def __init__(self, worker: Worker, request: Request) -> None:
        self.request = request
        self.completions: list[Completion] = []
        self._worker = worker
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._ended = False

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """What each step adds; raises what ended the request other than its own end."""
        while not self._ended:
            event = await self._events.get()
            if event.error is not None:
                self._ended = True
                raise event.error
            if event.completions is not None:
                self._ended = True
                self.completions = event.completions
            if event.deltas:
                yield event.deltas

    def cancel(self) -> None:
        """Gives the request up, unless it has ended; its memory is free from the next step on, and
        who iterates sees the end.
        """
        if not self._ended:
            self._ended = True
            self._worker.cancel(self)
            self._events.put_nowait(_Event())

    def post(self, event: _Event) -> None:
        """Takes what the worker hands over; on the event loop."""
        self._events.put_nowait(event)


class Worker:
    """Runs the steps of one generation loop.

    Args:
        loop: nobody else has to step it.
        most: requests that are held at once, running and waiting.

    Attributes:
        active: requests that are held.
    """

    def __init__(self, loop: GenerationLoop, most: int) -> None:
        self.active, self.most = 0, most
        self._loop = loop
        self._streams: dict[Stream, None] = {}  # the thread's own
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._closing = False
        self._events: asyncio.AbstractEventLoop | None = None
        # Forms wait for each other, and nobody else for them: a large one takes a second.
        self._forms = ThreadPoolExecutor(1, "tilewright-forms")
        self._thread = threading.Thread(target=self._run, name="tilewright-steps", daemon=True)

    def start(self) -> None:
        """Starts the thread; to be called on the event loop that requests come from."""
        self._events = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Ends the thread when the requests that it holds have ended."""
        self._put(lambda: None, closing=True)
        await asyncio.to_thread(self._thread.join)
        self._forms.shutdown(wait=False)

    async def submit(self, prompt: list[int], params: SamplingParams) -> Stream:
        """Takes a request.

        Raises:
            QueueFull: there are too many.
            UsageError, CapacityError: a prompt or params that cannot be taken.
        """
        if self.active >= self.most:
            raise QueueFull(
                "the server",
                expected=f"at most {self.most} requests at once",
                found=f"{self.active}",
                remedy="Try again later.",
            )
        self.active += 1
        try:
            streams = params.prompt_logprobs is None  # these come at the end
            prepare = partial(self._loop.prepare, prompt, params, streams=streams)
            form = params.structured_outputs is not None
            if form or len(prompt) > _SHORT:
                threads = self._forms if form else None
                request = await asyncio.get_running_loop().run_in_executor(threads, prepare)
            else:
                request = prepare()
        except BaseException:
            self.active -= 1
            raise
        stream = Stream(self, request)
        self._put(lambda: self._add(stream))
        return stream

    def cancel(self, stream: Stream) -> None:
        """Gives a request up, if it has not ended."""
        self._put(lambda: self._drop(stream))

    def _put(self, work: Callable[[], None], *, closing: bool = False) -> None:
        with self._wake:
            self._inbox.append(work)
            self._closing |= closing
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._streams or self._closing):
                    self._wake.wait()
                work, self._inbox = self._inbox, []
                if self._closing and not work and not self._streams:
                    return
            for one in work:
                one()
            if self._streams:
                self._hand_over(self._step())

    def _add(self, stream: Stream) -> None:
        self._streams[stream] = None
        self._loop.add(stream.request)

    def _drop(self, stream: Stream) -> None:
        if stream in self._streams:
            self._loop.cancel(stream.request)
            self._hand_over([], ended=[stream])  # nobody listens any more

    def _step(self) -> list[tuple[Stream, _Event]]:
        try:
            self._loop.step()
        except Exception as error:  # whatever it is, the thread has to go on
            log.exception("a step failed; the requests that were running are given up")
            return [(stream, self._failed(stream, error)) for stream in self._streams]
        return [(stream, event) for stream in self._streams if (event := self._event(stream))]

    def _event(self, stream: Stream) -> _Event | None:
        request = stream.request
        try:
            with self._loop.lock:
                deltas, finished = request.take_deltas(), request.finished
            if not deltas and not finished:
                return None
            return _Event(deltas, request.completions() if finished else None)
        except TilewrightError as error:
            return self._failed(stream, error)

    def _failed(self, stream: Stream, error: Exception) -> _Event:
        self._loop.cancel(stream.request)
        return _Event(error=error)

    def _hand_over(
        self, events: Sequence[tuple[Stream, _Event]], ended: Sequence[Stream] = ()
    ) -> None:
        over = [s for s, event in events if event.completions is not None or event.error]
        over += ended
        for stream in over:
            del self._streams[stream]
        if self._events is not None and (events or over):
            self._events.call_soon_threadsafe(self._deliver, events, len(over))

    def _deliver(self, events: Sequence[tuple[Stream, _Event]], ended: int) -> None:
        self.active -= ended
        for stream, event in events:
            stream.post(event)

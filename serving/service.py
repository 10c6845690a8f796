"""What answers requests: one engine, its worker, and the rules of the server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import TilewrightError
from ..runtime.engine import CausalLMEngine
from ..runtime.output import Completion, Delta
from ..runtime.params import SamplingParams
from .access import Access, Lease, Limits
from .catalog import Catalog
from .event_stream import EventStream
from .failures import RETRY_AFTER, Refused, status_of
from .registry.manifest import Preset
from .replies import Reply
from .worker import Stream, Worker

log = logging.getLogger(__name__)

Prompts: TypeAlias = "Sequence[tuple[list[int], SamplingParams]]"
"""Prompts, and how each is sampled."""

_CLIENT_GONE = 499  # nginx's: nobody reads it
_SMALL = 4096  # bytes of a body: reading it takes less than a thread costs that has to wait for us


@dataclass(frozen=True, slots=True)
class Rules:
    """What a server allows.

    Attributes:
        models: names that clients may use for the engine, the first one is sent back.
        keys: of clients; none to serve anybody.
        limits: of each key.
        most_requests: that are held at once, running and waiting; more are answered with 429.
        most_body: bytes of a request's body.
        deadline: seconds that an answer may take, from its arrival; it is cut then. None for any.
        catalog: what is known of these and other names.
        patience: seconds that a client may take to send its request, or to take any more of what
            it is sent, before it is hung up on.
    """

    models: tuple[str, ...]
    keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    most_requests: int = 1024
    most_body: int = 8 << 20
    deadline: float | None = None
    catalog: Catalog = field(default_factory=Catalog)
    patience: float = 60.0


class Service:
    """Answers requests with an engine.

    Attributes:
        draining: whether new requests are turned away, because the server is about to end.
    """

    def __init__(self, engine: CausalLMEngine, rules: Rules) -> None:
        self.engine, self.rules = engine, rules
        self.worker = Worker(engine.loop, rules.most_requests)
        self.access = Access(rules.keys, rules.limits)
        self.started, self.draining = int(time.time()), False
        self._began = time.monotonic()

    def enter(self, request: Request) -> Lease:
        """Lets a request in, until the lease is closed.

        Raises:
            Refused: 401, 429 or 503.
        """
        who = self.access.who(request.headers.get("authorization"))
        if self.draining:
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, "the server is ending", retry_after=RETRY_AFTER
            )
        return self.access.enter(who)

    def model(self, wanted: str | None) -> str:
        """The name of the model to send back.

        Raises:
            Refused: 404: another model.
        """
        if wanted is None or wanted in self.rules.models:
            return wanted or self.rules.models[0]
        entry = self.rules.catalog.entry(wanted)
        if self.rules.catalog.answers_for(entry):
            return wanted
        message = f"no model {wanted[:100]!r} here, but: {', '.join(self.rules.models)}"
        if entry is not None:
            message += f"; it is registered: tilewright serve {entry.name.short}"
        raise Refused(HTTPStatus.NOT_FOUND, message, param="model")

    def names(self) -> list[str]:
        """All that it answers to."""
        catalog, own = self.rules.catalog, self.rules.models
        others = [entry.name.short for entry in catalog.entries() if catalog.answers_for(entry)]
        return [*own, *(name for name in others if name not in own)]

    def preset(self, name: str) -> Preset:
        """How a model of this server is asked where a request says nothing else."""
        catalog = self.rules.catalog
        if name in self.rules.models:
            return catalog.preset
        return catalog.other_preset(name) or Preset()

    @property
    def uptime(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began

    @property
    def bytes_of_weights(self) -> int:
        """As they are loaded."""
        held = self.engine.runner.constants.values()
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())

    def spell(self, token_id: int) -> str:
        """The text of a token; its number where there is no tokenizer."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            return f"token_id:{token_id}"
        return tokenizer.decode([token_id], skip_special_tokens=False)

    def room(self, prompt: Sequence[int]) -> int:
        """Tokens that the context leaves for an answer, 1 at least: the engine says the rest. Where
        nothing bounds an answer it has the context for itself.
        """
        config = self.engine.config
        used = len(prompt) if config.window is None else 0
        return max(1, config.max_model_len - used)

    async def ask(
        self, http: Request, read: Callable[[], tuple[Prompts, Reply]], *, streams: bool
    ) -> Response:
        """Lets a request in, reads it, on another thread unless it is small, and answers it.

        Raises:
            Refused: it is not let in.
            TilewrightError: it cannot be taken; nothing of it runs on.
        """
        lease = self.enter(http)
        try:
            prompts, reply = read() if _is_small(http) else await asyncio.to_thread(read)
            return await self.answer(http, lease, prompts, reply, streams=streams)
        except BaseException:
            lease.close()
            raise

    async def answer(
        self,
        http: Request,
        lease: Lease,
        prompts: Prompts,
        reply: Reply,
        *,
        streams: bool,
    ) -> Response:
        """Answers prompts, each with `n` completions, and closes the lease at the end.

        Raises:
            TilewrightError: a prompt that cannot be taken; nothing of the request runs on.
        """
        begun: list[Stream] = []
        try:
            for prompt, params in prompts:
                begun.append(await self.worker.submit(prompt, params))
        except BaseException:
            self._end(begun, lease)
            raise
        if streams:
            events = self._events(begun, reply)
            return EventStream(
                events,
                reply.media_type,
                given_up=lambda: _cancel(begun),
                ended=lambda: self._end(begun, lease),
            )
        try:
            return await self._whole(http, begun, reply)
        finally:
            self._end(begun, lease)

    def _end(self, streams: Sequence[Stream], lease: Lease) -> None:
        _cancel(streams)
        lease.close()

    async def _whole(self, http: Request, streams: Sequence[Stream], reply: Reply) -> Response:
        reading = asyncio.ensure_future(_completions(streams))
        gone = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait({reading, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return Response(status_code=_CLIENT_GONE)
            return JSONResponse(reply.whole(reading.result()))
        finally:
            reading.cancel()
            gone.cancel()

    async def _events(self, streams: Sequence[Stream], reply: Reply) -> AsyncIterator[bytes]:
        try:
            async for place, deltas in _merged(streams):
                pieces = [piece for delta in deltas for piece in reply.pieces(place, delta)]
                if pieces:
                    yield b"".join(map(reply.frame, pieces))
            ends = reply.closing([one for s in streams for one in s.completions])
            if last := b"".join(map(reply.frame, ends)) + reply.done:
                yield last
        except TilewrightError as error:  # the status has been sent
            yield reply.frame(reply.broken(status_of(error), str(error)))
        except Exception as error:
            log.exception("a stream ends early")
            yield reply.frame(reply.broken(500, f"unexpected: {type(error).__name__}"))


def _cancel(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.cancel()


def _is_small(http: Request) -> bool:
    length = http.headers.get("content-length", "")
    return length.isdigit() and int(length) <= _SMALL


async def _completions(streams: Sequence[Stream]) -> list[Completion]:
    for stream in streams:
        async for _ in stream:
            pass
    return [one for stream in streams for one in stream.completions]


async def _merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, list[Delta]]]:
    """(which stream, what it adds) of all streams, as it comes."""
    if len(streams) == 1:
        async for deltas in streams[0]:
            yield 0, deltas
        return
    queue: asyncio.Queue[tuple[int, list[Delta]]] = asyncio.Queue()

    async def pump(place: int, stream: Stream) -> None:
        async for deltas in stream:
            queue.put_nowait((place, deltas))

    async with asyncio.TaskGroup() as group:
        pumps = [group.create_task(pump(place, one)) for place, one in enumerate(streams)]
        over = group.create_task(_after(pumps, queue))
        while (found := await queue.get())[0] >= 0:
            yield found
        await over


async def _after(
    pumps: Sequence[asyncio.Task[None]], queue: asyncio.Queue[tuple[int, list[Delta]]]
) -> None:
    await asyncio.wait(pumps)
    queue.put_nowait((-1, []))


async def _disconnected(http: Request) -> None:
    """Returns when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass

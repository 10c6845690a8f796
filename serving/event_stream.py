"""A response in pieces, which costs the event loop as little as it can until its first piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

# Seconds. What runs here keeps the interpreter's lock from the worker, which wants it for the step
# that the first piece comes from. By then it has launched that step.
_ATTEND_AFTER = 0.002


class EventStream(StreamingResponse):
    """A stream of objects.

    Args:
        events: what is sent. It ends soon once `given_up` was called.
        media_type: of it.
        given_up: called if the client goes before the end.
        ended: called at the end, whatever that is. A client may go before the first event, and
            events that nobody has asked for have no end of their own.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        media_type: str,
        *,
        given_up: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        super().__init__(events, media_type=media_type)
        self._events, self._given_up, self._ended = events, given_up, ended
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        attending: list[asyncio.Task[None]] = []

        def attend() -> None:
            attending.append(asyncio.ensure_future(self._attend(receive, send)))

        timer = asyncio.get_running_loop().call_later(_ATTEND_AFTER, attend)
        try:
            async for event in self._events:
                await self._begin(send)
                await send(_piece(event))
            await self._begin(send)
            await send(_piece(b"", more=False))
        except OSError as error:  # what a server of ASGI 2.4 raises
            raise ClientDisconnect from error
        finally:
            timer.cancel()
            for task in attending:
                task.cancel()
            self._ended()

    async def _attend(self, receive: Receive, send: Send) -> None:
        """Tells the client that its request was taken, and looks whether it is still there."""
        with suppress(OSError):
            await self._begin(send)
            while (await receive())["type"] != "http.disconnect":
                pass
        self._given_up()

    async def _begin(self, send: Send) -> None:
        if not self._begun:
            self._begun = True
            head = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **head})


def _piece(event: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": event, "more_body": more}

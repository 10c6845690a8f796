"""One client's connection, which may not keep the server waiting for ever."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_HEAD = 64 << 10  # bytes, as h11 has it


class Connection(HttpToolsProtocol):
    """HTTP/1.1 as uvicorn speaks it, by httptools: by h11 a request costs a third of a millisecond
    more. Who sends a head without end, begins a request and does not send its rest, or does not
    take what was sent, is hung up on: what their request held is free then.

    Args:
        patience: seconds for a whole request to arrive, and for some of an answer to be taken when
            the buffers between here and there are full.
    """

    def __init__(self, *args: Any, patience: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self._patience = patience
        self._head: int | None = None  # bytes of one that has not ended
        self._arrival: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _watch(transport.get_extra_info("socket"), self._patience)
        self._arrival = self.loop.call_later(self._patience, transport.abort)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0

    def on_headers_complete(self) -> None:
        self._head = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > _MOST_HEAD and not self.transport.is_closing():
                self.send_400_response(f"The head is larger than {_MOST_HEAD} bytes.")
        if not self._arriving():
            _cancel(self._arrival)
            self._arrival = None
        elif self._arrival is None:
            self._arrival = self.loop.call_later(self._patience, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self.loop.call_later(self._patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._taking)
        self._taking = None

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._arrival)
        _cancel(self._taking)
        super().connection_lost(exc)

    def _arriving(self) -> bool:
        """Whether the rest of a head, or of a body, is still to come."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body


def connections(patience: float) -> type[asyncio.Protocol]:
    """What makes a connection, for uvicorn's `Config(http=…)`."""
    made: Callable[..., asyncio.Protocol] = partial(Connection, patience=patience)
    return cast("type[asyncio.Protocol]", made)


def _watch(sock: socket.socket | None, patience: float) -> None:
    """Lets the system end a connection whose other end is gone, or takes nothing: what is left of
    an answer that has ended would wait in the buffers for ever.
    """
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = max(1, round(patience))
    for name, value in (
        ("TCP_KEEPIDLE", seconds),
        ("TCP_KEEPINTVL", max(1, seconds // 4)),
        ("TCP_USER_TIMEOUT", max(1, round(patience * 1000))),
    ):
        if hasattr(socket, name):  # Linux has all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()

"""uvicorn around the app: one signal drains, a second one kills."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import UsageError
from .connection import connections

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Serves an app until a signal comes: then no new requests are taken, and those that run are
    answered. A second signal ends them too.

    Args:
        app: of `make_app`. To be run with the sockets of `bind`.
        listens: called once it can be connected to.
    """

    def __init__(self, app: FastAPI, listens: Callable[[], None] = lambda: None) -> None:
        # Access is not logged: paths say nothing that metrics do not, and headers hold keys.
        service = app.state.service
        config = uvicorn.Config(
            app,
            http=connections(service.rules.patience),
            ws="none",
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # nobody asks where a client is
            timeout_keep_alive=30,
        )
        super().__init__(config)
        self._service, self._listens = service, listens

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts listening, and says so."""
        await super().startup(sockets)
        self._listens()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains; kills, if it does so already."""
        self._service.draining = True
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The handlers, while it serves; what came is not raised again behind it."""
        before = {sig: signal.signal(sig, self.handle_exit) for sig in _SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def allow_connections() -> None:
    """Lets this process have as many connections as the system does: a shell's own limit of open
    files is 1024 in many places.
    """
    try:
        import resource
    except ModuleNotFoundError:  # Windows, which has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS says "without limit", and takes no more than its own.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def bind(host: str, port: int) -> socket.socket:
    """An address to serve on; nobody can connect before the server does.

    Args:
        host: a name or number of this machine.
        port: 0 for any that is free.

    Raises:
        UsageError: the address cannot be had.
    """
    found: socket.socket | None = None
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(info[0], info[1])
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(info[4])
    except (OSError, OverflowError) as error:
        if found is not None:
            found.close()
        raise UsageError(
            "options --host and --port",
            expected="an address of this machine that is free",
            found=f"{host}:{port}: {error}",
            remedy="Choose another port; 0 takes any that is free.",
        ) from error
    return found


def address(bound: socket.socket) -> str:
    """The URL of an address that is bound."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

"""uvicorn around the app: one signal drains, a second one kills."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import UsageError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Serves an app until a signal comes: then no new requests are taken, and those that run are
    answered. A second signal ends them too.

    Args:
        app: of `make_app`.
        host: to listen on.
        port: 0 for any that is free.

    Attributes:
        served: the port, once it listens.
    """

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        # Access is not logged: paths say nothing that metrics do not, and headers hold keys.
        config = uvicorn.Config(
            app, host, port, log_level="warning", access_log=False, timeout_keep_alive=30
        )
        super().__init__(config)
        self._service = app.state.service

    @property
    def served(self) -> int:
        """The port that it listens on."""
        return int(self.servers[0].sockets[0].getsockname()[1])

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

    def listen(self) -> None:
        """Serves until a signal comes.

        Raises:
            UsageError: the address cannot be had.
        """
        config = self.config
        try:
            sockets = [config.bind_socket()]
        except SystemExit as error:  # what uvicorn makes of it
            raise UsageError(
                "options --host and --port",
                expected="an address of this machine that is free",
                found=f"{config.host}:{config.port}",
                remedy="Choose another port; 0 takes any that is free.",
            ) from error
        self.run(sockets=sockets)

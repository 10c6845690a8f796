"""A tiny engine behind a real server on a port of this machine."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import SimpleNamespace

import pytest

import tilewright as tw
from tilewright.serving.app import make_app
from tilewright.serving.server import Server, address, bind
from tilewright.serving.service import Rules
from tiny_gguf import write_tiny_gguf

NAME = "tiny"


@pytest.fixture(scope="session", autouse=True)
def _one_context() -> Iterator[None]:
    """Each client reads all certificates for a context of its own, and speaks plain HTTP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "tiny.gguf"
    write_tiny_gguf(path)
    return tw.compile(path, target="cpu", backend="eager", max_batch_size=8, verify="off")


def serving(engine, **rules) -> AbstractContextManager[SimpleNamespace]:
    """A server of an engine, as `serving_app` has it."""
    return serving_app(make_app(engine, Rules(**{"models": (NAME,), **rules})))


@contextmanager
def serving_app(app) -> Iterator[SimpleNamespace]:
    """The address of a server, its app's service, and what ends it."""
    server, bound = Server(app), bind("127.0.0.1", 0)
    listening = threading.Event()
    start = server.startup

    async def startup(sockets=None):
        await start(sockets)
        listening.set()

    server.startup = startup
    server.capture_signals = lambda: _nothing()  # a thread may not handle signals
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    assert listening.wait(30)
    try:
        url = address(bound)
        yield SimpleNamespace(url=url, service=app.state.service, server=server, thread=thread)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# Not for longer: its event loop would live through what other tests do to the clock.
@pytest.fixture(scope="module")
def served(engine) -> Iterator[SimpleNamespace]:
    with serving(engine) as server:
        yield server


@pytest.fixture(scope="session")
def serve(engine) -> Callable[..., object]:
    return lambda **rules: serving(engine, **rules)


@pytest.fixture(scope="session")
def serve_app() -> Callable[..., object]:
    return serving_app


@pytest.fixture
def serve_any() -> Callable[..., object]:
    return serving

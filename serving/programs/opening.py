"""Where programs run: a thread for an engine or a server, for as long as one of them needs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import UsageError
from ...runtime.engine import CausalLMEngine
from .local_model import LocalModel
from .running import Background
from .server_model import ServerModel

_lock = threading.Lock()
_shared: dict[int, Background] = {}  # by their engines' ids, which last as long
_users: dict[int, int] = {}


@contextmanager
def opened(
    on: CausalLMEngine | str, api_key: str | None, model: str | None
) -> Iterator[Background]:
    """Opens an engine or a server; all who have an engine open at a time share its steps.

    Args:
        on: the engine, or the server's URL.
        api_key, model: of a server.

    Raises:
        UsageError: neither of the two, or an engine without a tokenizer.
    """
    if isinstance(on, CausalLMEngine):
        background = _enter(on)
        try:
            yield background
        finally:
            _leave(on)
        return
    if not isinstance(on, str) or not on.startswith(("http://", "https://")):
        raise UsageError(
            "what the program runs on",
            expected="an engine for this machine, or a server's URL: http://localhost:8000/v1",
            found=repr(on)[:80],
            remedy="Compile or load the model first, or start it with `tilewright serve`.",
        )
    background = Background(ServerModel(on, api_key, model))
    background.open()
    try:
        yield background
    finally:
        background.close()


def _enter(engine: CausalLMEngine) -> Background:
    key = id(engine)
    with _lock:
        if key not in _shared:
            background = Background(LocalModel(engine))
            background.open()
            _shared[key], _users[key] = background, 0
        _users[key] += 1
        return _shared[key]


def _leave(engine: CausalLMEngine) -> None:
    key = id(engine)
    with _lock:
        _users[key] -= 1
        if _users[key]:
            return
        background = _shared.pop(key)
    background.close()

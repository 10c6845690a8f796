"""A worker process: builds a runner, and runs what it is asked to, until it is killed.

Questions and answers are JSON lines on two pipes of their own, whose numbers are the arguments:
what kernel code prints goes elsewhere. A thread reads, so that the process ends with its parent
even while something hangs.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from .config import Config
from .tunable import Runner

_MEMORY_WORDS = ("out of memory", "out_of_memory")
_LONGEST = 400  # letters of an exception that are worth sending


def main(requests: int, answers: int) -> None:
    """Answer requests until their pipe is closed.

    Args:
        requests: a file descriptor to read from.
        answers: one to write to.
    """
    for descriptor in (requests, answers):
        os.set_inheritable(descriptor, False)  # what kernel code starts must not hold them open
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reader = threading.Thread(
        target=_read, args=(os.fdopen(requests, "rb"), lines.put), daemon=True
    )
    reader.start()
    served = _Served()
    while True:
        request = json.loads(lines.get())
        answer = json.dumps({"id": request["id"], **served.answer(request)}) + "\n"
        _write(answers, answer.encode())


def _read(stream: BinaryIO, put: Callable[[bytes], None]) -> None:
    for line in stream:
        put(line)
    os._exit(0)  # the parent is gone; the main thread may hang in a kernel


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class _Served:
    """The one runner of this process."""

    def __init__(self) -> None:
        self.runner: Runner | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"value": self._value(request)}
        except BaseException as error:  # sys.exit() of a candidate too
            return {"memory": _is_of_memory(error), "error": _words(error)}

    def _value(self, request: dict[str, Any]) -> Any:
        phase = request["phase"]
        if phase == "open":
            self.runner = None  # it lets go of its buffers before the next takes its own
            module, _, name = request["function"].partition(":")
            self.runner = getattr(importlib.import_module(module), name)(request["spec"])
            return None
        assert self.runner is not None, "a runner is opened first"
        if phase == "facts":
            return dict(self.runner.facts())
        config = Config.from_json(request["config"])
        if phase == "load":
            self.runner.prepare(config)
            return None
        if phase == "check":
            return float(self.runner.check(config))
        assert phase == "time", phase
        return [float(seconds) for seconds in self.runner.time(config, request["rounds"])]


def _is_of_memory(error: BaseException) -> bool:
    named = any("outofmemory" in kind.__name__.lower() for kind in type(error).__mro__)
    text = str(error).lower()
    return isinstance(error, MemoryError) or named or any(w in text for w in _MEMORY_WORDS)


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_LONGEST] if text else type(error).__name__


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

"""A process that measures: questions as JSON lines go in, answers as JSON lines come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any, TextIO

from ....errors import EngineError
from ..checkout import Checkout

Answer = Mapping[str, Any]
_DYING = 5.0  # seconds for a process that has closed its stdout to be gone


class Worker:
    """A module of a checkout, run as a process that answers.

    Args:
        checkout: whose code.
        module: within the package.
        arguments: of its command line.

    Attributes:
        ready: its first line, which it prints once it has set itself up.

    Raises:
        EngineError: the process ends instead of answering; what it said last is in the message.
    """

    def __init__(self, checkout: Checkout, module: str, *arguments: str) -> None:
        self.name = f"{module.rsplit('.', 1)[-1]} of {checkout.root}"
        # A pipe would fill, and stop it.
        self.errors: IO[str] = tempfile.TemporaryFile(  # noqa: SIM115  closed by close()
            "w+", encoding="utf-8", errors="replace"
        )
        self.process = subprocess.Popen(
            checkout.command(module, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=checkout.environment(),
            cwd=tempfile.gettempdir(),
        )
        self.ready: Answer = {}

    def start(self) -> Answer:
        """Waits for its first line."""
        self.ready = self._answer()
        return self.ready

    def ask(self, question: Mapping[str, object]) -> Answer:
        """One question, one answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        return self._answer()

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with suppress(OSError):  # a question that it died of is still to be written
                    stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Answer:
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()).endswith("\n"):
            if (answer := _parsed(line)) is None:
                continue  # printed by what was imported before serve() took stdout over
            if "error" in answer:
                raise self._failed(str(answer["error"]))
            return answer
        raise self._ended()  # nothing, or a line that death cut off

    def _ended(self) -> EngineError:
        with suppress(subprocess.TimeoutExpired):  # its own exit code tells more than our kill
            self.process.wait(_DYING)
        self.process.kill()
        code = self.process.wait()
        ending = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines()
        return self._failed(f"{said[-1]} ({ending})" if said else ending)

    def _failed(self, found: str) -> EngineError:
        return EngineError(
            f"measuring process {self.name}",
            expected="an answer",
            found=found,
            remedy="Run tilewright verify on the engine; TILEWRIGHT_DEBUG=1 shows more.",
        )


def _parsed(line: str) -> Answer | None:
    """The JSON object of a line; None for a line that is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def serve(setup: Callable[[], tuple[Answer, Callable[[Mapping[str, Any]], Answer]]]) -> None:
    """The worker's side: sets up, then answers until the questions end.

    Args:
        setup: gives the first line, and what answers a question.
    """
    answers: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is not an answer

    def say(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        first, answer = setup()
        say(first)
        for line in sys.stdin:
            say(answer(json.loads(line)))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
        raise

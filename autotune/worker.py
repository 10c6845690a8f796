"""The parent's side of a worker process: ask, wait so long and no longer, kill."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..errors import EngineError, UnsupportedError
from .config import Config
from .outcome import CandidateError, Status
from .tunable import RunnerSpec

Phase = Literal["load", "check", "time", "facts"]
_DOING = {"load": "loading", "check": "checking", "time": "timing", "facts": "reading the clocks"}
_LAST_WORDS = 4096  # bytes of stderr that are looked at
_KILL_SECONDS = 10.0  # a process that waits for a driver may take a while to die, or never do


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that a worker may take, each at a time; then it is killed.

    Attributes:
        start: to start, import and build the runner.
        load: to load a config.
        check: to run and compare it.
        time: to time one round.
    """

    start: float = 120.0
    load: float = 60.0
    check: float = 60.0
    time: float = 10.0


class WorkerError(EngineError):
    """No worker that works: its runner cannot be built, or the reference fails in a fresh one."""


class Runs(Protocol):
    """What the pool asks of a worker; `Worker` is one, and tests have others.

    Raises:
        CandidateError: of every method that takes a config, where the config fails.
        WorkerError: of `open`, where no runner comes of the spec.
    """

    def open(self, spec: RunnerSpec) -> None:
        """Build the runner, in place of the one before."""

    def load(self, config: Config) -> None:
        """Load the binary of a config."""

    def check(self, config: Config) -> float:
        """The largest error of a config as a multiple of its tolerance."""
        ...

    def time(self, config: Config, rounds: int) -> tuple[float, ...]:
        """Seconds of each round."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What the runner tells of the device."""
        ...

    def close(self) -> None:
        """End it, whatever it is doing."""


class Worker:
    """A process of its own session, so that neither Ctrl-C nor a crash of it reaches its sibling.

    Args:
        limits: how long it may take.
        environment: of the process, None: ours. Our `sys.path` is added, so that what we can import
            it can too.

    Raises:
        UnsupportedError: there is no Python to start.
    """

    def __init__(
        self, limits: Limits | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        if not sys.executable:
            raise UnsupportedError(
                "tuning",
                expected="a Python to start workers with (sys.executable)",
                found="none: Python is embedded in another program",
                remedy="Tune with the tilewright command, and load the engine here.",
            )
        self.limits = limits or Limits()
        self._asked, self._buffer = 0, b""
        # A pipe would fill up. Closed in close().
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        theirs, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        env = dict(os.environ if environment is None else environment)
        env["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker_main", str(theirs), str(answers)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                pass_fds=(theirs, answers),
                env=env,
                start_new_session=True,
            )
        finally:
            os.close(theirs)
            os.close(answers)

    def open(self, spec: RunnerSpec) -> None:
        """Build the runner, in place of the one before.

        Raises:
            WorkerError: it cannot be built, or not in time.
        """
        try:
            self._ask({"phase": "open", **spec.to_json()}, self.limits.start, "starting")
        except CandidateError as error:
            self.close()
            raise WorkerError(
                f"runner {spec.function}",
                expected="a runner, built in a worker process",
                found=error.reason,
                remedy="See whether the function can be called in a fresh Python on this machine.",
            ) from error

    def load(self, config: Config) -> None:
        """Load the binary of a config.

        Raises:
            CandidateError: the config fails.
        """
        self._phase("load", config, self.limits.load)

    def check(self, config: Config) -> float:
        """The largest error of a config as a multiple of its tolerance.

        Raises:
            CandidateError: the config fails.
        """
        return float(self._phase("check", config, self.limits.check))

    def time(self, config: Config, rounds: int) -> tuple[float, ...]:
        """Seconds of each round.

        Raises:
            CandidateError: the config fails, or its runner gives no positive times.
        """
        found = self._phase("time", config, self.limits.time * rounds, rounds=rounds)
        if len(found) != rounds or not all(0 < seconds < math.inf for seconds in found):
            reason = f"its runner gave {found} for {rounds} rounds"
            raise CandidateError("failed", reason, breaks=False)
        return tuple(found)

    def facts(self) -> Mapping[str, Any]:
        """What the runner tells of the device; nothing where it cannot.

        Raises:
            CandidateError: the worker died or hung over it.
        """
        try:
            return dict(self._ask({"phase": "facts"}, self.limits.check, _DOING["facts"]))
        except CandidateError as error:
            if error.status != "failed":
                raise
            return {}

    def close(self) -> None:
        """Kill it and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # it waits for the driver, and is left behind
            self.process.wait(_KILL_SECONDS)
        if not self._said.closed:
            os.close(self._requests)
            os.close(self._answers)
            self._said.close()

    def _phase(self, phase: Phase, config: Config, seconds: float, **more: Any) -> Any:
        request = {"phase": phase, "config": config.to_json(), **more}
        return self._ask(request, seconds, _DOING[phase])

    def _ask(self, request: dict[str, Any], seconds: float, doing: str) -> Any:
        self._asked += 1
        deadline = time.monotonic() + seconds
        line = json.dumps({"id": self._asked, **request}).encode() + b"\n"
        try:
            self._send(line, deadline)
            answer = json.loads(self._line(deadline))
            if answer["id"] != self._asked:
                raise ValueError(f"an answer to another request, {answer['id']}")
        except TimeoutError:
            reason = f"no answer within {seconds:g} s while {doing}"
            raise CandidateError("hung", reason, breaks=True) from None
        except (EOFError, OSError):
            raise CandidateError("crashed", self._end(doing), breaks=True) from None
        except (ValueError, KeyError, TypeError) as error:
            reason = f"unreadable answer while {doing}: {error}"
            raise CandidateError("crashed", reason, breaks=True) from None
        if "error" in answer:
            status: Status = "out_of_memory" if answer["memory"] else "failed"
            # Once something was launched, what else it may have done is unknown.
            breaks = request["phase"] in ("check", "time")
            raise CandidateError(status, f"{answer['error']} (while {doing})", breaks=breaks)
        return answer["value"]

    def _send(self, data: bytes, deadline: float) -> None:
        os.set_blocking(self._requests, False)
        while data:
            self._await(self._requests, select.POLLOUT, deadline)
            data = data[os.write(self._requests, data) :]

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            self._await(self._answers, select.POLLIN, deadline)
            if not (read := os.read(self._answers, 1 << 16)):
                raise EOFError
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _await(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()  # not select(): it takes no descriptor beyond 1023
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError

    def _end(self, doing: str) -> str:
        try:
            code = self.process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return f"it closed its pipe while {doing}"
        how = f"killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        said = self._last_words()
        return f"{how} while {doing}" + (f"; its last words: {said}" if said else "")

    def _last_words(self) -> str:
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - _LAST_WORDS))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else ""


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name} (the system's out-of-memory killer?)" if name == "SIGKILL" else name

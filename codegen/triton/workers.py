"""Processes that compile kernels. One takes a second or two to start, so those within
`kept_workers` are kept for the next jobs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from ...errors import UnsupportedError

Job = Mapping[str, Any]
Answer = Mapping[str, Any]


class Worker:
    """A process that answers one job after the other.

    Args:
        environment: what it gets; a folder for Triton's own cache is added.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        if not sys.executable:
            raise UnsupportedError(
                "compiling kernels",
                expected="a Python to start workers with (sys.executable)",
                found="none: Python is embedded in another program",
                remedy="Compile with the tilewright command, and load the engine here.",
            )
        self.environment = dict(environment)
        self._folder = tempfile.TemporaryDirectory(prefix="tilewright-")
        # A pipe would fill up. Closed in close().
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            # Our cache is by content; Triton's goes by the names of files.
            env={**environment, "TRITON_CACHE_DIR": self._folder.name},
            cwd=self._folder.name,
        )

    def answers(self, jobs: Sequence[Job]) -> list[Answer]:
        """An answer for each job; a process that ends before answers the rest with its last words.

        One job at a time: what it has not read while it waits to be read would block both.
        """
        found: list[Answer] = []
        for job in jobs:
            line = self._asked(json.dumps(job) + "\n")
            if not line.endswith("\n"):  # it ended, maybe as it wrote
                break
            found.append(json.loads(line))
        if len(found) < len(jobs):
            found += [self._last_words()] * (len(jobs) - len(found))
        return found

    def _asked(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:
            return ""
        return self.process.stdout.readline()

    def _last_words(self) -> Answer:
        code = self.process.wait()
        self._said.seek(0)
        said = self._said.read()
        return {"error": (said.strip().splitlines() or [f"exit code {code}"])[-1], "trace": said}

    @property
    def lives(self) -> bool:
        """Whether it can take another job."""
        return self.process.poll() is None

    def close(self) -> None:
        """Ends it, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not written yet
                    pipe.close()
        self._said.close()
        self._folder.cleanup()


class _Kept:
    """The idle workers of this process, while someone wants them kept."""

    def __init__(self) -> None:
        self.lock, self.users, self.owner = threading.Lock(), 0, os.getpid()
        self.idle: list[Worker] = []

    def take(self, environment: Mapping[str, str]) -> Worker:
        with self.lock:
            if self.owner != os.getpid():  # a fork: its parent's workers are not its own
                self.idle, self.users, self.owner = [], 0, os.getpid()
            while self.idle:
                worker = self.idle.pop()
                if worker.lives and worker.environment == environment:
                    return worker
                worker.close()
        return Worker(environment)

    def give(self, worker: Worker) -> None:
        with self.lock:
            if self.users and worker.lives:
                self.idle.append(worker)
                return
        worker.close()

    def enter(self) -> None:
        with self.lock:
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            done = [] if self.users else self.idle
            if done:
                self.idle = []
        for worker in done:
            worker.close()


_KEPT = _Kept()


@contextmanager
def kept_workers() -> Iterator[None]:
    """Inside, processes that compile are kept from one call to the next; they end with the last
    that wants them.
    """
    _KEPT.enter()
    try:
        yield
    finally:
        _KEPT.leave()


def in_workers(
    shares: Sequence[Sequence[Job]], environment: Mapping[str, str]
) -> list[list[Answer]]:
    """The answers of each share, a process each; none outlives an interrupt."""
    running: list[Worker] = []

    def run(jobs: Sequence[Job]) -> list[Answer]:
        worker = _KEPT.take(environment)
        running.append(worker)
        return worker.answers(jobs)

    try:
        with ThreadPoolExecutor(len(shares)) as pool:
            try:
                answers = list(pool.map(run, shares))
            except BaseException:
                for worker in running:
                    worker.process.kill()  # who reads from it sees the end, and the pool ends
                raise
    except BaseException:
        for worker in running:
            worker.close()
        raise
    for worker in running:
        _KEPT.give(worker)
    return answers

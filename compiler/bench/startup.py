"""Startup of an engine or a model, in fresh processes: import, load or compile, first token."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import EngineError

Advance = Callable[[str, float], None]
PHASES = ("import", "ready", "first_token")


@dataclass(frozen=True, slots=True)
class Startup:
    """Seconds of each phase, one figure a process.

    Attributes:
        imports: of tilewright and torch.
        ready: of loading the engine, or of compiling the model and starting it.
        first_token: of the first request, prompt of a few tokens.
        process: the whole process, the interpreter's own start included.
    """

    imports: tuple[float, ...]
    ready: tuple[float, ...]
    first_token: tuple[float, ...]
    process: tuple[float, ...]

    def medians(self) -> dict[str, float]:
        """The median of each phase, in seconds."""
        phases = (self.imports, self.ready, self.first_token, self.process)
        names = ("import", "ready", "first_token", "process")
        return dict(zip(names, map(statistics.median, phases), strict=True))


def measure_startup(
    path: str, backend: str, repeat: int, advance: Advance = lambda phase, share: None
) -> Startup:
    """Starts ``repeat`` processes one after the other; files are cached after the first.

    Raises:
        EngineError: a process that fails; what it said is in the message.
    """
    found: list[dict[str, float]] = []
    for index in range(repeat):
        advance(f"process {index + 1} of {repeat}", index / repeat)
        found.append(_one(path, backend))
    return Startup(*(tuple(run[name] for run in found) for name in (*PHASES, "process")))


def _one(path: str, backend: str) -> dict[str, float]:
    command = [sys.executable, "-m", f"{__package__}.startup_child", path, backend]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise EngineError(
            f"starting {path}",
            expected="a process that generates a token",
            found=said[-1],
            remedy="Try tilewright generate with it first.",
        )
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**times, "process": seconds}

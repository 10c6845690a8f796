"""Startup of an engine or a model, in fresh processes: import, load or compile, first token."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import EngineError

Advance = Callable[[str, float], None]
PHASES = ("import", "ready", "weights", "first_token")


@dataclass(frozen=True, slots=True)
class Startup:
    """Seconds of each phase, one figure a process.

    Attributes:
        imports: of tilewright and torch.
        ready: of loading the engine, or of compiling the model and starting it.
        weights: of that, bringing the weights to the device: reading, laying out.
        first_token: of the first request, prompt of a few tokens.
        process: the whole process, the interpreter's own start included.
    """

    imports: tuple[float, ...]
    ready: tuple[float, ...]
    weights: tuple[float, ...]
    first_token: tuple[float, ...]
    process: tuple[float, ...]

    @property
    def beyond_weights(self) -> tuple[float, ...]:
        """Of the whole process without bringing the weights to the device."""
        pairs = zip(self.process, self.weights, strict=True)
        return tuple(process - weights for process, weights in pairs)

    def medians(self) -> dict[str, float]:
        """The median of each phase, in seconds."""
        phases = {
            "import": self.imports,
            "ready": self.ready,
            "weights": self.weights,
            "first_token": self.first_token,
            "process": self.process,
            "beyond_weights": self.beyond_weights,
        }
        return {name: statistics.median(runs) for name, runs in phases.items()}


def measure_startup(
    path: str,
    backend: str,
    repeat: int,
    advance: Advance = lambda phase, share: None,
    checkpoint: Path | None = None,
) -> Startup:
    """Starts ``repeat`` processes one after the other; files are cached after the first.

    Args:
        path: an engine, or a model, which each process compiles.
        backend: for a model.
        repeat: processes.
        advance: told which process runs, and the share that is done.
        checkpoint: where the weights are that the engine refers to, if not where they were.

    Raises:
        EngineError: a process that fails; what it said is in the message.
    """
    found: list[dict[str, float]] = []
    for index in range(repeat):
        advance(f"process {index + 1} of {repeat}", index / repeat)
        found.append(_one(path, backend, checkpoint))
    return Startup(*(tuple(run[name] for run in found) for name in (*PHASES, "process")))


def _one(path: str, backend: str, checkpoint: Path | None) -> dict[str, float]:
    command = [sys.executable, "-m", f"{__package__}.startup_child", path, backend]
    if checkpoint is not None:
        command.append(str(checkpoint))
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

"""What trials of kernels share: the ways are compiled side by side, each in a process of its own;
then one process measures them in turn, and is replaced where a kernel hangs or breaks the device.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from graph_timing import seconds_of

LIMIT = 20.0  # seconds for a line of the measuring process
BEGIN = 60.0  # for its first one

Line = dict[str, object]
Launch = tuple[Any, tuple[object, ...], tuple[int, ...], dict[str, Any]]
"""A kernel, its arguments, the grid, and options of the launch."""


def us_of(calls: Sequence[Callable[[], object]], rounds: int) -> float:
    """Median microseconds of a call, of a graph that goes round them so many times."""
    return 1e6 * seconds_of(lambda index: calls[index % len(calls)](), rounds * len(calls))


def used_by(launch: Launch) -> str:
    """Compiles a kernel into Triton's cache, without running it: the resources that it takes."""
    kernel, args, grid, options = launch
    compiled = kernel.warmup(*args, grid=grid, **options)
    compiled._init_handles()
    used = f"{compiled.n_regs} registers, {compiled.n_spills} spilled"
    return f"{used}, {compiled.metadata.shared} B shared"


def compile_all(
    script: str, names: Sequence[str], seconds: float, options: Sequence[str] = ()
) -> None:
    """Runs ``script --compile NAME OPTIONS…`` for all of them at once; waits so long for each."""
    commands = [[sys.executable, script, "--compile", name, *options] for name in names]
    workers = [subprocess.Popen(command) for command in commands]
    for worker in workers:
        try:
            worker.wait(seconds)
        except subprocess.TimeoutExpired:
            worker.kill()


def say(names: Sequence[str], measure: Callable[[str], Iterable[Line]]) -> None:
    """Measures ways in this process, and prints what becomes known of each as lines of JSON."""
    for name in names:
        said: Line = {"name": name, "end": True}
        try:
            for line in measure(name):
                print(json.dumps({"name": name, **line}), flush=True)
        except Exception as error:  # a broken way must not take the others along
            text = str(error).strip().splitlines() or [type(error).__name__]
            said |= {"failed": text[-1][:150], "broken": isinstance(error, RuntimeError)}
        print(json.dumps(said), flush=True)
        if said.get("broken"):  # the device's context may be lost: the rest gets another process
            os._exit(1)


def measured(script: str, names: Sequence[str], options: Sequence[str] = ()) -> list[Line]:
    """What ``script OPTIONS… --measure NAME …``, which calls `say`, has said of all of them."""
    lines: list[Line] = []
    left = list(names)
    while left:
        left = _follow([script, *options], left, lines)
    return lines


def _follow(script: Sequence[str], names: list[str], lines: list[Line]) -> list[str]:
    """Reads one measuring process to its end, or kills it; what it left undone comes back."""
    command = [sys.executable, *script, "--measure", *names]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            said.put(line)
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    left, limit, broken = list(names), BEGIN, False
    while left and not broken:
        try:
            line = said.get(timeout=limit)
        except queue.Empty:
            process.kill()
            lines.append({"name": left.pop(0), "failed": f"said nothing for {limit:.0f} s: killed"})
            break
        if line is None:
            lines.append({"name": left.pop(0), "failed": f"process ended with {process.wait()}"})
            break
        if line.startswith("{"):
            lines.append(json.loads(line))
            limit, broken = LIMIT, bool(lines[-1].get("broken"))
            if lines[-1].get("end"):
                left.remove(str(lines[-1]["name"]))
    process.wait()
    return left

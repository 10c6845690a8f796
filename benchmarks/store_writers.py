"""Two processes that write one tuning store at once, and the check that nothing is lost.

    python benchmarks/store_writers.py STORE TAG SECONDS    # one writer; starts at a line on stdin

Each adds records of its own, replaces some of them and drops what was replaced, while a third
process reads. ``bench_autotune.py writers`` runs it for a minute, the tests for two seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tilewright.autotune.config import Config
from tilewright.autotune.key import Conditions, Key
from tilewright.autotune.record import Record
from tilewright.autotune.store import Store

TAGS = ("a", "b")
EVERY = 7  # records after which an older one is written again, and the file compacted
LEAST = 20  # records of each writer, however slow the disk is


@dataclass(frozen=True, slots=True)
class Written:
    """What the writers did, and what was found afterwards.

    Attributes:
        added: records of each writer.
        replaced: of these, written a second time.
        reads: of the third process, meanwhile.
        found: records in the store.
        wrong: what is missing, older than it should be, or damaged, in words; empty if nothing is.
    """

    added: tuple[int, ...]
    replaced: int
    reads: int
    found: int
    wrong: tuple[str, ...]


def made(tag: str, number: int, seed: int) -> Record:
    """Record ``number`` of a writer; ``seed`` tells the second version from the first."""
    config = Config((("block_m", 16), ("num_warps", 4)))
    return Record(
        key=Key(f"writer_{tag}", "a" * 64, "b" * 64, (("tokens", number),), "h100", 90),
        conditions=Conditions("3.6.0", "13.0", "0.1.0"),
        config=config,
        seconds=1e-5,
        default=config,
        default_seconds=1e-5,
        numerics="",
        runners_up=(),
        failed=(),
        trials=1,
        seed=seed,
        budget="quick",
        made="2026-01-02T03:04:05+00:00",
    )


def write(path: str, tag: str, seconds: float) -> int:
    """Writes for so long, and gives the number of records."""
    store, count = Store(path), 0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends or count < LEAST:
        count += 1
        store.add(made(tag, count, 0))
        if count % EVERY == 0:
            store.add(made(tag, count, 1))
            store.compact()
    return count


def run_writers(path: Path, seconds: float) -> Written:
    """Two writers for so long, read meanwhile by this process, and what they left behind.

    Raises:
        RuntimeError: a writer failed, a reader was warned of something, or saw records vanish.
    """
    with ExitStack() as stack:
        writers = [_started(stack, path, tag, seconds) for tag in TAGS]
        for writer in writers:
            assert writer.stdout is not None
            if writer.stdout.readline() != "ready\n":
                raise RuntimeError("a writer did not start")
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        reads = _read_meanwhile(path, writers)
        counts = tuple(_count_of(writer) for writer in writers)
    return checked(path, counts, reads)


def _started(stack: ExitStack, path: Path, tag: str, seconds: float) -> subprocess.Popen[str]:
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    writer = subprocess.Popen(
        [sys.executable, "-W", "error", __file__, str(path), tag, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    stack.callback(writer.communicate)
    stack.callback(writer.kill)
    return writer


def _read_meanwhile(path: Path, writers: Sequence[subprocess.Popen[str]]) -> int:
    reader, seen, reads = Store(path), 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(writer.poll() is None for writer in writers):
            now = len(reader.records())
            if now < seen:
                raise RuntimeError(f"{seen - now} of {seen} records vanished")
            seen, reads = now, reads + 1
    return reads


def _count_of(writer: subprocess.Popen[str]) -> int:
    assert writer.stdout is not None
    said = writer.stdout.read()
    if writer.wait() != 0:
        raise RuntimeError(f"a writer ended with exit code {writer.returncode}")
    return int(said)


def checked(path: Path, counts: tuple[int, ...], reads: int) -> Written:
    """What is in the store of writers that say they added so many records each."""
    found = {record.key: record for record in Store(path).records()}
    wrong: list[str] = []
    for tag, count in zip(TAGS, counts, strict=True):
        for number in range(1, count + 1):
            expected = made(tag, number, int(number % EVERY == 0))
            if (there := found.pop(expected.key, None)) != expected:
                what = "missing" if there is None else "an older version, or changed"
                wrong.append(f"record {number} of writer {tag}: {what}")
    wrong += [f"{key}: nobody wrote it" for key in found]
    if path.with_name(f"{path.name}.damaged").exists():
        wrong.append("lines were damaged")
    replaced = sum(count // EVERY for count in counts)
    return Written(counts, replaced, reads, len(Store(path).records()), tuple(wrong))


def main() -> None:
    """One writer."""
    path, tag, seconds = sys.argv[1:]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    print(write(path, tag, float(seconds)))


if __name__ == "__main__":
    main()

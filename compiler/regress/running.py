"""Which of a kernel's binaries run in a phase, compared: one that is never chosen costs nothing,
so no other series has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .matching import Pair
from .snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Runs:
    """The binaries of one kernel that run in one phase, by their labels.

    Attributes:
        phase: which.
        subject: the kernel, as the new side calls it.
        old, new: labels on either side.
        there: labels of all the binaries that the new side has.
    """

    phase: str
    subject: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    there: frozenset[str]

    @property
    def differs(self) -> bool:
        """Whether other binaries run."""
        return set(self.old) != set(self.new)

    @property
    def lost(self) -> tuple[str, ...]:
        """Those that run no longer."""
        return tuple(name for name in self.old if name not in self.new)

    @property
    def stopped(self) -> tuple[str, ...]:
        """Those that run no longer, though the package still has them."""
        return tuple(name for name in self.lost if name in self.there)

    @property
    def note(self) -> str:
        """What differs, in words: "split, merge no longer run; prefill does"."""
        gone = [name for name in self.lost if name not in self.there]
        came = [name for name in self.new if name not in self.old]
        words = []
        if self.stopped:
            words.append(f"{_named(self.stopped)} no longer {_verb(self.stopped, 'run', 'runs')}")
        if gone:
            words.append(f"{_named(gone)} {_verb(gone, 'are', 'is')} gone")
        if came and words:
            words.append(f"{_named(came)} {_verb(came, 'do', 'does')}")
        elif came:
            words.append(f"{_named(came)} {_verb(came, 'run', 'runs')} too")
        return "; ".join(words)


def compared_runs(old: Snapshot, new: Snapshot, pairs: Iterable[Pair]) -> Iterator[Runs]:
    """For each kernel and phase that both sides have; nothing where a side does not know it."""
    phases = [phase for phase in new.running if phase in old.running]
    for before, after in pairs:
        if before is None or after is None:
            continue
        there = frozenset(after.cubins)
        for phase in phases:
            was = _labels(old.running[phase], before.subject)
            now = _labels(new.running[phase], after.subject)
            yield Runs(phase, after.subject, was, now, there)


def _labels(running: Mapping[str, tuple[str, ...]], subject: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(running.get(subject, ())))


def _named(labels: Iterable[str]) -> str:
    return ", ".join(label or "its one binary" for label in labels)


def _verb(labels: Iterable[str], several: str, one: str) -> str:
    return one if len(tuple(labels)) == 1 else several

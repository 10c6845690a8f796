"""One file of tuning records, a line each: read, mended, appended to, rewritten."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import TilewrightError
from .lines import append_lines, locked, replace_lines
from .record import FORMAT, Identity, Record

_SHOWN = 3  # damaged lines that a warning names


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not empty.

    Attributes:
        number: in the file, from 1.
        data: its bytes, without the end.
        record: what it says; None where it is damaged or of another format.
        damage: why it is of no use; "" where it is good, or of another format.
    """

    number: int
    data: bytes
    record: Record | None = None
    damage: str = ""


Change = Callable[[Sequence[Line]], Iterable[bytes]]
_Stamp = tuple[int, int, int]


class Table:
    """A file of records, which need not exist.

    Args:
        path: the file; a link is followed, so that its writers share one lock.
        mend: whether damaged lines may be moved out of it, into `<name>.damaged`.
    """

    def __init__(self, path: str | Path, *, mend: bool) -> None:
        self.path = Path(os.path.realpath(path))
        self._mend = mend
        self._known: tuple[_Stamp | None, tuple[Record, ...]] | None = None

    def records(self) -> tuple[Record, ...]:
        """The usable records, the last one of each key and conditions. Never an error.

        A damaged line is set aside, and a file that cannot be read counts as empty, each with one
        warning. The file is parsed again only when it has changed.
        """
        stamp = self._stamp()
        if self._known is None or self._known[0] != stamp:
            self._known = stamp, latest(line.record for line in self._usable() if line.record)
        return self._known[1]

    def lines(self) -> list[Line]:
        """All lines but the empty ones, read now; none where there is no file.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        numbered = enumerate(data.split(b"\n"), start=1)
        return [_parsed(number, line) for number, line in numbered if line.strip()]

    def append(self, record: Record) -> None:
        """Add a line; on return the disk has it.

        Raises:
            OSError: the file cannot be written.
        """
        with locked(self.path):
            append_lines(self.path, [record.line.encode()])

    def rewrite(self, change: Change) -> list[Line]:
        """Replace the file's lines by what `change` makes of the good ones, other writers waiting.

        Afterwards there is a file.

        Returns:
            the damaged lines, now in `<name>.damaged`.

        Raises:
            OSError: the file cannot be read or written.
        """
        with locked(self.path):
            lines = self.lines()
            bad = [line for line in lines if line.damage]
            after = list(change([line for line in lines if not line.damage]))
            if bad:  # first there, then away from here: a crash between them doubles, not loses
                append_lines(self._aside, [line.data for line in bad])
            if after != [line.data for line in lines] or not self.path.exists():
                replace_lines(self.path, after)
        return bad

    def warn(self, bad: Sequence[Line], done: str) -> None:
        """One warning for some damaged lines, if there are any."""
        if bad:
            named = "; ".join(f"line {line.number}: {line.damage}" for line in bad[:_SHOWN])
            more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            _warn(f"{self.path}: what is damaged is {done}, the rest is used ({named}{more})")

    @property
    def _aside(self) -> Path:
        return self.path.with_name(self.path.name + ".damaged")

    def _usable(self) -> list[Line]:
        try:
            lines = self.lines()
        except OSError as error:
            _warn(f"{self.path} cannot be read ({error.strerror}): it counts as empty")
            return []
        bad = [line for line in lines if line.damage]
        if bad and self._mend:
            try:
                # Read anew under the lock: the last line may just have been in the writing.
                self.warn(self.rewrite(_unchanged), f"set aside in {self._aside.name}")
                lines, bad = self.lines(), []
            except OSError as error:
                self.warn(bad, f"skipped and not set aside ({error.strerror})")
        else:
            self.warn(bad, "skipped")
        good = [line for line in lines if not line.damage]
        if foreign := sum(line.record is None for line in good):
            _warn(f"{self.path}: {foreign} of its lines are of another format, and not used")
        return good

    def _stamp(self) -> _Stamp | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


def latest(records: Iterable[Record]) -> tuple[Record, ...]:
    """The last record of each key and conditions, in the order of those."""
    kept: dict[Identity, Record] = {}
    for record in records:
        kept.pop(record.identity, None)
        kept[record.identity] = record
    return tuple(kept.values())


def _parsed(number: int, data: bytes) -> Line:
    try:
        found = json.loads(data.decode("utf-8"))
        version = found.get("format") if isinstance(found, dict) else None
        if type(version) is int and version != FORMAT:
            return Line(number, data)  # of another version of ours: not damaged, and kept
        return Line(number, data, Record.from_json(found))
    except (TilewrightError, ValueError, OverflowError, RecursionError) as error:
        return Line(number, data, damage=str(error) or type(error).__name__)


def _unchanged(lines: Sequence[Line]) -> list[bytes]:
    return [line.data for line in lines]


def _warn(text: str) -> None:
    warnings.warn(f"tuning store {text}", stacklevel=5)

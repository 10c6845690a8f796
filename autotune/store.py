"""The store of tuning records: a file of this machine, and the tables that were shipped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from .lines import locked
from .record import Record
from .table import Line, Table, latest

__all__ = ["Record", "Store", "unwritable"]


class Store:
    """Where records are kept and looked for.

    Making one touches no file, and reading never fails: what is damaged or cannot be read is
    warned of once, and the rest is used. Any number of processes may add to one store at a time.

    Args:
        path: the file that records are added to; it and its folder need not exist.
        shipped: files that are only read.
    """

    def __init__(self, path: str | Path, shipped: Sequence[str | Path] = ()) -> None:
        self._own = Table(path, mend=True)
        self._shipped = tuple(Table(table, mend=False) for table in shipped)

    @property
    def path(self) -> Path:
        """The file that records are added to, links followed."""
        return self._own.path

    def records(self) -> tuple[Record, ...]:
        """The records of this machine's file, the last one of each key and conditions."""
        return self._own.records()

    def shipped(self) -> tuple[tuple[Path, tuple[Record, ...]], ...]:
        """The shipped tables and their records, in the order they were given in."""
        return tuple((table.path, table.records()) for table in self._shipped)

    def check_writable(self) -> None:
        """Asks whether `add` can work, before the time is spent on what is to be added.

        Raises:
            UsageError: the file cannot be written.
        """
        try:
            with locked(self.path), open(self.path, "ab"):
                pass
        except OSError as error:
            raise unwritable(self.path, error) from error

    def add(self, record: Record) -> None:
        """Add a record, in the place of an earlier one of the same key and conditions.

        On return the disk has it. The earlier one stays in the file until `compact`.

        Raises:
            UsageError: the file cannot be written.
        """
        try:
            self._own.append(record)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def compact(self) -> int:
        """Drop the lines that later ones replace, and give their number.

        Raises:
            UsageError: the file cannot be written.
        """
        dropped = 0

        def change(lines: Sequence[Line]) -> list[bytes]:
            nonlocal dropped
            kept = {id(record) for record in latest(x.record for x in lines if x.record)}
            after = [x.data for x in lines if x.record is None or id(x.record) in kept]
            dropped = len(lines) - len(after)
            return after

        try:
            bad = self._own.rewrite(change)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._own.warn(bad, "set aside")
        return dropped


def unwritable(path: Path, error: OSError) -> UsageError:
    """The error of a store that cannot be written."""
    return UsageError(
        f"tuning store {path}",
        expected="a file in a folder that can be written",
        found=error.strerror or str(error),
        remedy="Give another path, or set TILEWRIGHT_CACHE to a folder that can be written.",
    )

"""Several stores in one: from other machines, other workers, or for a table to ship."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .record import Identity, Record
from .store import unwritable
from .table import Line, Table


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge came to.

    Attributes:
        read: usable records read, those of the target among them.
        kept: records of the target afterwards, one for each key and conditions.
        damaged: lines that were of no use; those of the target are set aside, those of the other
            files stay where they are.
    """

    read: int
    kept: int
    damaged: int


def merge(paths: Sequence[str | Path], into: str | Path) -> Merged:
    """Put the records of some files into one, which is replaced at once.

    Of each key and conditions the record that was made last is kept. The order of the files does
    not matter, nor how often one is merged: of records that were made in the same moment it is
    their text that decides. The target is sorted, so that it reads well in a diff. Lines of another
    format go along as they are.

    Args:
        paths: files of records; read only.
        into: the target, which need not exist; what it holds takes part.

    Raises:
        UsageError: a file is missing or cannot be read, or the target cannot be written.
    """
    target = Table(into, mend=True)
    lines, damaged, read = list[Line](), 0, 0
    for table in (Table(path, mend=False) for path in paths):
        found = [] if table.path == target.path else _read(table)
        bad = [line for line in found if line.damage]
        table.warn(bad, "skipped")
        damaged += len(bad)
        lines += (line for line in found if not line.damage)
    kept: list[bytes] = []

    def change(own: Sequence[Line]) -> list[bytes]:
        nonlocal kept, read
        every = [*own, *lines]
        read = sum(line.record is not None for line in every)
        kept = [record.line.encode() for record in newest(x.record for x in every if x.record)]
        return [*kept, *sorted({line.data for line in every if line.record is None})]

    try:
        bad = target.rewrite(change)
    except OSError as error:
        raise unwritable(target.path, error) from error
    target.warn(bad, "set aside")
    return Merged(read, len(kept), damaged + len(bad))


def newest(records: Iterable[Record]) -> list[Record]:
    """The record of each key and conditions that was made last, sorted for reading."""
    kept: dict[Identity, Record] = {}
    for record in records:
        rival = kept.get(record.identity)
        if rival is None or _age(rival) < _age(record):
            kept[record.identity] = record
    return sorted(kept.values(), key=_place)


def _age(record: Record) -> tuple[object, ...]:
    return record.when, record.line


def _place(record: Record) -> tuple[object, ...]:
    key = record.key
    # Sizes by number and not by text: 16 before 128. The kind comes first, for they do not compare.
    problem = [(name, isinstance(value, str), value) for name, value in key.problem]
    return key.device, key.template, problem, record.line


def _read(table: Table) -> list[Line]:
    try:
        if table.path.exists():
            return table.lines()
        problem = "none"
    except OSError as error:
        problem = error.strerror or str(error)
    raise UsageError(
        f"tuning store {table.path}",
        expected="a file of tuning records",
        found=problem,
        remedy="Correct the path.",
    )

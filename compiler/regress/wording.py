"""The words and figures that every report shares, so that all say the same thing the same way."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ...autotune.verdicts import Verdict
from .model import Comparison, Diff, Row, Side
from .snapshot import PROGRAMS

# What XML 1.0 forbids, and DEL and the C1 range with it: a terminal takes some of them as commands.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# (from, what it is divided by, unit): small sizes are read better as they are.
SECONDS = ((1.0, 1.0, "s"), (1e-3, 1e-3, "ms"), (1e-6, 1e-6, "µs"), (1e-9, 1e-9, "ns"))
BYTES = ((1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (1e4, 1e3, "kB"))
EXACT_INTEGER = 1e15
COMMIT_SHOWN = 12
OF_ONE = 6  # rows of one kernel or phase in a table: the next kernel must be seen too
ACCEPT = 'tilewright regress record --reason "…"'

# Each verdict as it is counted, and whether a count of none is said too.
COUNTED = (
    (Verdict.REGRESSION, "regressions", True),
    (Verdict.MISSING, "missing", False),
    (Verdict.IMPROVEMENT, "improvements", True),
    (Verdict.CHANGED, "changed", False),
    (Verdict.NO_CHANGE, "unchanged", True),
    (Verdict.UNDECIDABLE, "undecided", True),
)


@dataclass(frozen=True, slots=True)
class KernelDiff:
    """One diff, and each place it was found at: targets often share a kernel's source.

    Attributes:
        diff: the first of them.
        index: its place among the comparison's diffs.
        places: "case on target", in order.
    """

    diff: Diff
    index: int
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table.

    Attributes:
        row: what it shows; the first of those that are left out where it stands for several.
        targets: on which that is so.
        more: how many rows of the same kernel or phase it says are left out; 0: it shows its own.
    """

    row: Row
    targets: tuple[str, ...]
    more: int = 0

    @property
    def count(self) -> int:
        """Rows that it stands for."""
        return self.more or len(self.targets)

    @property
    def target(self) -> str:
        """Its targets, as text."""
        return listed(self.targets)


def outcome(comparison: Comparison) -> str:
    """In a word or two; what compares nothing has not passed."""
    if not comparison.rows:
        return "Nothing compared"
    return "Failed" if comparison.exit_code else "Passed"


def headline(comparison: Comparison) -> str:
    """The outcome in one line: "2 regressions, 1 improvement, 143 unchanged, 0 undecided"."""
    counts = {verdict: len(comparison.of(verdict)) for verdict, _, _ in COUNTED}
    parts = [
        f"{counts[verdict]} {noun.removesuffix('s') if counts[verdict] == 1 else noun}"
        for verdict, noun, always in COUNTED
        if always or counts[verdict]
    ]
    return ", ".join(parts)


def clean(text: str) -> str:
    """The text without control characters, its lines ended by a newline each."""
    return CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def one_line(text: str, most: int) -> str:
    """The text on one line of at most ``most`` characters."""
    flat = " ".join(clean(text).split())
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"


def cut_bytes(text: str, room: int) -> str:
    """The start of the text that fits into ``room`` bytes of UTF-8, whole lines if it has any."""
    encoded = text.encode("utf-8")
    if len(encoded) <= room:
        return text
    head = encoded[: max(room, 0)].decode("utf-8", errors="ignore")
    whole, newline, _ = head.rpartition("\n")
    return whole if newline else head


def quantity(value: float | None, unit: str) -> str:
    """A value with its unit, rounded for reading."""
    if value is None:
        return "none"
    if not math.isfinite(value):
        return f"{value} {unit}".strip()
    steps = {"s": SECONDS, "bytes": BYTES}.get(unit, ())
    for least, factor, name in steps:
        if abs(value) >= least:
            return f"{value / factor:.4g} {name}"
    return f"{_number(value)} {unit}".strip()


def _number(value: float) -> str:
    if value == int(value) and abs(value) < EXACT_INTEGER:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < EXACT_INTEGER else f"{value:.4g}"


def change(row: Row) -> str:
    """Old and new; empty for a row without figures."""
    if row.old is None and row.new is None:
        return ""
    return between(row.old, row.new, row.unit)


def between(old: float | None, new: float | None, unit: str) -> str:
    """Old → new; exact where rounding would hide that they differ."""
    words = quantity(old, unit), quantity(new, unit)
    if words[0] == words[1] and old != new:
        words = f"{old!r} {unit}".strip(), f"{new!r} {unit}".strip()
    return " → ".join(words)


def ratio(row: Row) -> str:
    """New over old: with its interval where it was measured, else by division."""
    if row.ratio is not None:
        low, high = (_end(end) for end in (row.ratio.low, row.ratio.high))
        return f"{_factor(row.ratio.value)}× ({low} to {high})"
    if row.old is None or row.new is None or row.old == row.new or row.old == 0:
        return ""
    return f"{_factor(row.new / row.old)}×"


def _factor(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


def _end(value: float) -> str:
    return _factor(value) if math.isfinite(value) else "any"


def shortened(rows: Iterable[Row], most: int = OF_ONE) -> list[Line]:
    """The rows for reading: equal ones of several targets once, and a few of a kernel or phase."""
    alike: dict[Row, list[str]] = {}
    for row in rows:
        alike.setdefault(replace(row, target=""), []).append(row.target)
    merged = [
        Line(replace(row, target=targets[0]), tuple(targets)) for row, targets in alike.items()
    ]
    lines: list[Line] = []
    for _, group in groupby(merged, lambda x: (x.row.case, x.row.target, x.row.subject)):
        found = list(group)
        cut = most if len(found) > most + 1 else len(found)  # a line for one row would save none
        lines += found[:cut]
        if hidden := found[cut:]:
            targets = dict.fromkeys(target for line in hidden for target in line.targets)
            count = sum(line.count for line in hidden)
            lines.append(Line(hidden[0].row, tuple(targets), count))
    return lines


def causes(comparison: Comparison) -> list[tuple[str, str]]:
    """What is generated otherwise where there are findings: (in words, the places that share it).

    The pass after which graphs differ is said first, then the kernels.
    """
    failed = {where(row) for row in comparison.findings}
    differ: dict[str, list[Row]] = {}
    for row in comparison.of(Verdict.CHANGED, Verdict.REGRESSION):
        if row.tier == 1 and where(row) in failed:
            differ.setdefault(where(row), []).append(row)
    found: dict[str, list[str]] = {}
    for place, rows in differ.items():
        program = [row.note for row in rows if row.subject in PROGRAMS and row.note]
        kernels = listed([row.subject for row in rows if row.subject not in PROGRAMS])
        words = "; ".join([*dict.fromkeys(program), *([f"kernels: {kernels}"] if kernels else [])])
        if words:
            found.setdefault(words, []).append(place)
    return [(words, listed(places)) for words, places in found.items()]


def listed(items: Sequence[str], most: int = 4) -> str:
    """The first few, and how many more there are."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f", and {more} more" if more > 0 else "")


def where(row: Row | Diff) -> str:
    """Where in the suite: "case on target"."""
    return f"{row.case} on {row.target}"


def side(of: Side) -> str:
    """A side in one line: label, commit, device, when and why it was recorded."""
    parts = [of.label]
    if of.commit:
        parts.append(f"commit {of.commit[:COMMIT_SHOWN]}")
    if of.device:
        parts.append(of.device)
    if of.recorded:
        parts.append(f"recorded {of.recorded}")
    line = ", ".join(parts)
    return f"{line}: {of.reason}" if of.reason else line


def versions(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Each package's name with its old and new version, those that differ first."""
    old, new = comparison.old.versions, comparison.new.versions
    found = [(name, old.get(name, "none"), new.get(name, "none")) for name in sorted({*old, *new})]
    return sorted(found, key=lambda version: version[1] == version[2])


def kernel_diffs(comparison: Comparison) -> list[KernelDiff]:
    """The diffs, equal ones once, those of kernels with a finding first."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for index, diff in enumerate(comparison.diffs):
        alike.setdefault((diff.subject, diff.what, diff.text), []).append(index)
    grouped = [
        KernelDiff(
            comparison.diffs[indices[0]],
            indices[0],
            tuple(where(comparison.diffs[index]) for index in indices),
        )
        for indices in alike.values()
    ]
    blamed = {row.subject for row in comparison.findings}
    return sorted(grouped, key=lambda group: group.diff.subject not in blamed)


def places(group: KernelDiff, most: int = 4) -> str:
    """Where a diff was found, on one line."""
    return listed(group.places, most)

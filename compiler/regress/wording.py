"""The words and figures that every report shares, so that all say the same thing the same way."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ...autotune.verdicts import Verdict
from .model import Comparison, Diff, Row, Side

# What XML 1.0 forbids, and DEL and the C1 range with it: a terminal takes some of them as commands.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e4, "kB"))
EXACT_INTEGER = 1e15
COMMIT_SHOWN = 12
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
    for factor, name in steps:
        if abs(value) >= factor:
            return f"{value / factor:.4g} {name}"
    return f"{_number(value)} {unit}".strip()


def _number(value: float) -> str:
    if value == int(value) and abs(value) < EXACT_INTEGER:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < EXACT_INTEGER else f"{value:.4g}"


def change(row: Row) -> str:
    """Old and new; exact where rounding would hide that they differ."""
    old, new = quantity(row.old, row.unit), quantity(row.new, row.unit)
    if old == new and row.old != row.new:
        old, new = (f"{value!r} {row.unit}".strip() for value in (row.old, row.new))
    return f"{old} → {new}"


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
    hidden = len(group.places) - most
    text = ", ".join(group.places[:most])
    return f"{text} and {hidden} more" if hidden > 0 else text

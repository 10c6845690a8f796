"""Tiers 1 and 2, compared: what is generated, kernel by kernel, and what it must cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ...autotune.verdicts import Verdict
from ...errors import UsageError
from .baseline import RECORD, Baseline
from .collect import Key, mismatches, working_tree
from .gates import UNITS, bare, judge
from .matching import (
    Pair,
    first_pass,
    kernel_diff,
    match_kernels,
    paired_series,
    program_diff,
)
from .model import Comparison, Diff, Row, Side
from .snapshot import KernelSnapshot, Number, Snapshot, plain_name
from .suite import Case, Suite

What: TypeAlias = Literal["changed", "added", "gone"]
_MOST_BLAMED = 6
_PARTS = {"launches": 0, "flops": 1, "bytes": 2}  # series that `Snapshot.parts` shares out
_NOT_EXPECTED = "differs where nothing should"


def compare_snapshots(
    suite: Suite,
    old: Baseline | None,
    new: Mapping[Key, Snapshot],
    expect_identical: bool = False,
    only: Sequence[str] | None = None,
    new_side: Side | None = None,
) -> Comparison:
    """Compares what was collected with a baseline.

    Args:
        suite: says what is watched, and how far it may move.
        old: the baseline; with None every case is missing.
        new: what was collected.
        expect_identical: whether any difference of what is generated is a finding.
        only: names of the cases to compare; None for all, those that the suite lost included.
        new_side: what ``new`` is of; by default the working tree.

    Raises:
        UsageError: the sides were made with other versions of Triton, torch or transformers.
    """
    started = time.perf_counter()
    side = new_side or working_tree()
    if old is not None:
        _check_versions(old, new, side)
    rows: list[Row] = []
    diffs: list[Diff] = []
    for case in suite.chosen(only):
        for target in case.targets:
            row = _row(case, target)
            before = old.snapshots.get((case.name, target)) if old is not None else None
            missing = _missing(old, before, new.get((case.name, target)), case)
            if missing:
                rows.append(replace(row, series="baseline", verdict=Verdict.MISSING, note=missing))
                continue
            after = new[case.name, target]
            assert before is not None
            compared = _Compared(suite, case, before, after, expect_identical)
            rows += compared.rows()
            diffs += compared.diffs()
    if old is not None and only is None:
        rows += _left_over(suite, old)
    old_side = old.side if old is not None else Side("no baseline")
    seconds = time.perf_counter() - started
    return Comparison(suite.name, old_side, side, tuple(rows), tuple(diffs), seconds)


def _check_versions(old: Baseline, new: Mapping[Key, Snapshot], side: Side) -> None:
    for versions in (side.versions, *(snapshot.versions for snapshot in new.values())):
        differences = mismatches(old.side.versions, versions)
        if differences:
            raise UsageError(
                f"baseline {old.side.label}",
                expected="the versions that it was recorded with",
                found=", ".join(differences),
                remedy=f"Install those, or record it anew with these: {RECORD}.",
            )


def _missing(
    old: Baseline | None, before: Snapshot | None, after: Snapshot | None, case: Case
) -> str:
    """Why a case cannot be compared, in words; empty where it can."""
    if old is None:
        return f"there is no baseline: record one with {RECORD}"
    if before is None:
        return f"the baseline {old.side.label} lacks it: record it with {RECORD}"
    if after is None:
        return "it was not collected"
    if before.definition != case.definition:
        return f"stale: the case is defined otherwise now; record it anew with {RECORD}"
    if after.definition != case.definition:
        return "it was collected from another definition of the case"
    return ""


def _left_over(suite: Suite, old: Baseline) -> Iterator[Row]:
    wanted = {(case.name, target) for case in suite.cases for target in case.targets}
    for case, target in old.snapshots:
        if (case, target) not in wanted:
            yield Row(
                tier=1,
                case=case,
                target=target,
                subject="case",
                series="suite",
                owner=suite.owner,
                unit="",
                better="equal",
                old=None,
                new=None,
                gate="",
                verdict=Verdict.MISSING,
                note=f"the baseline has it, the suite no longer; if that is meant, {RECORD}",
            )


def _row(case: Case, target: str) -> Row:
    """A row of a case, yet without anything in it."""
    return Row(
        1, case.name, target, "case", "", case.owner, "", "equal", None, None, "", Verdict.NO_CHANGE
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    """A case on a target, on both sides."""

    suite: Suite
    case: Case
    old: Snapshot
    new: Snapshot
    expect_identical: bool

    def rows(self) -> list[Row]:
        pairs = match_kernels(self.old, self.new)
        rows = [self._kernel(*pair) for pair in pairs]
        rows += [self._program(), *self._watched()]
        for old, new in pairs:
            if new is not None:
                for values in paired_series(old, new):
                    rows.append(self._figure(new.subject, *values))
        names = dict.fromkeys((*self.old.series, *self.new.series))
        for subject in names:
            rows += self._figures(subject)
        return rows

    def diffs(self) -> list[Diff]:
        found = [diff for pair in match_kernels(self.old, self.new) if (diff := self._diff(pair))]
        text = program_diff(self.old, self.new)
        return [*found, self._made("program", "changed", text)] if text else found

    def _diff(self, pair: Pair) -> Diff | None:
        old, new = pair
        if old is None and new is not None:
            return self._made(new.subject, "added", new.text)
        if new is None and old is not None:
            return self._made(old.subject, "gone", old.text)
        assert old is not None and new is not None
        text = kernel_diff(old, new)
        return self._made(new.subject, "changed", text) if text else None

    def _made(self, subject: str, what: What, text: str) -> Diff:
        return Diff(self.case.name, self.new.target, subject, what, text)

    def _base(self) -> Row:
        return _row(self.case, self.new.target)

    def _generated(self, subject: str, series: str, differs: bool, note: str) -> Row:
        """A row of tier 1."""
        verdict = Verdict.CHANGED if differs else Verdict.NO_CHANGE
        gate = "any"
        if self.expect_identical:
            gate = "±0"
            if differs:
                verdict = Verdict.REGRESSION
                note = f"{_NOT_EXPECTED}: {note}" if note else _NOT_EXPECTED
        return replace(
            self._base(), subject=subject, series=series, gate=gate, verdict=verdict, note=note
        )

    def _kernel(self, old: KernelSnapshot | None, new: KernelSnapshot | None) -> Row:
        if old is None:
            assert new is not None
            return self._generated(new.subject, "source", True, f"new: {new.id}")
        if new is None:
            return self._generated(old.subject, "source", True, f"gone: {old.id}")
        if old.digest == new.digest and old.cubins != new.cubins:
            note = "the source is the same, the machine code is not"
            return self._generated(new.subject, "source", True, note)
        what = [
            name
            for name, same in (
                ("source", old.text == new.text),
                ("launches", old.launches == new.launches),
            )
            if not same
        ]
        differs = old.digest != new.digest
        note = f"{' and '.join(what) or 'contraction'} changed" if differs else ""
        return self._generated(new.subject, "source", differs, note)

    def _program(self) -> Row:
        differs = self.old.program != self.new.program
        notes = [first_pass(self.old, self.new)]
        if differs and not program_diff(self.old, self.new):
            notes.append("its calls are the same but for the digests of kernels")
        elif notes[0] and not differs:  # how it came about is no part of what is generated
            notes.append("what comes out is the same")
        return self._generated("program", "source", differs, "; ".join(filter(None, notes)))

    def _watched(self) -> Iterator[Row]:
        called = {name.split("#")[0] for parts in self.new.parts.values() for name in parts}
        there = sorted(called | {plain_name(kernel.id) for kernel in self.new.kernels})
        for name in self.case.watch:
            if name not in there:
                note = f"the suite watches it, and it is gone; there are {', '.join(there)}"
                yield replace(
                    self._base(),
                    subject=name,
                    series="watched",
                    verdict=Verdict.MISSING,
                    note=note,
                )

    def _figures(self, subject: str) -> Iterator[Row]:
        old, new = self.old.series.get(subject, {}), self.new.series.get(subject, {})
        for series in dict.fromkeys((*old, *new)):
            yield self._figure(subject, series, old.get(series), new.get(series))

    def _figure(self, subject: str, series: str, old: Number | None, new: Number | None) -> Row:
        """A row of tier 2."""
        better, gate = self.suite.rule(subject, series)
        row = replace(
            self._base(),
            tier=2,
            subject=subject,
            series=series,
            unit=UNITS.get(bare(series), ""),
            better=better,
            old=old,
            new=new,
            gate=gate.words(better),
        )
        if old is None or new is None:
            side = "the baseline" if old is None else "what was collected"
            return replace(row, verdict=Verdict.CHANGED, note=f"{side} lacks it")
        verdict = judge(old, new, better, gate)
        note = "" if verdict is Verdict.NO_CHANGE else self._blame(subject, series)
        return replace(row, verdict=verdict, note=note)

    def _blame(self, phase: str, series: str) -> str:
        """Which kernels have more or less of a phase's sum, the largest changes first."""
        column = _PARTS.get(series)
        old, new = self.old.parts.get(phase, {}), self.new.parts.get(phase, {})
        if column is None:
            return ""
        nothing = (0, 0, 0)
        changes = [
            (name, old.get(name, nothing)[column], new.get(name, nothing)[column])
            for name in dict.fromkeys((*new, *old))
        ]
        changes = sorted((c for c in changes if c[1] != c[2]), key=lambda c: -abs(c[2] - c[1]))
        words = [f"{name} {a} → {b}" for name, a, b in changes[:_MOST_BLAMED]]
        more = len(changes) - len(words)
        return ", ".join(words) + (f", and {more} more" if more > 0 else "")

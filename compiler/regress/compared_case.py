"""One case on one target, compared: what is generated, kernel by kernel, and what it must cost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

from ...autotune.verdicts import Verdict
from .baseline import RECORD
from .blame import Blame
from .gates import UNITS, bare, judge
from .matching import Pair, kernel_diff, match_kernels, one_sided, paired_series, program_diff
from .model import Diff, Row
from .pass_diff import first_pass
from .running import Runs, compared_runs
from .snapshot import (
    DECODE_PROGRAM,
    PROGRAM,
    PROGRAMS,
    KernelSnapshot,
    Number,
    Snapshot,
    plain_name,
)
from .suite import Case, Suite

What: TypeAlias = Literal["changed", "added", "gone"]
_NOT_EXPECTED = "differs where nothing should"
_OF_PYTHON = re.compile(r" \(\d+\.\d+\)$")  # counted by one version: another counts otherwise


def empty_row(case: Case, target: str) -> Row:
    """A row of a case, yet without anything in it."""
    return Row(
        1, case.name, target, "case", "", case.owner, "", "equal", None, None, "", Verdict.NO_CHANGE
    )


@dataclass(frozen=True)
class ComparedCase:
    """A case on a target, on both sides.

    Attributes:
        suite, case: what is watched, and how far it may move.
        old, new: the sides.
        expect_identical: whether any difference of what is generated is a finding.
    """

    suite: Suite
    case: Case
    old: Snapshot
    new: Snapshot
    expect_identical: bool

    def rows(self) -> list[Row]:
        """Program and phases first, which say what a change costs, then the kernels by how much
        they weigh, each with all that is said of it. Where nothing should differ, what is generated
        comes before all of that.
        """
        rows = list(self._programs())
        for subject in dict.fromkeys((*PROGRAMS, *self.old.series, *self.new.series)):
            rows += self._figures(subject)
        rows += self._watched()
        weights = self._blame.weights()
        for pair in sorted(self._pairs, key=lambda pair: -weights.get(_subject(pair), 0.0)):
            rows += self._kernel(*pair)
        if self.expect_identical:
            rows.sort(key=lambda row: (row.tier, row.subject in PROGRAMS))
        return rows

    def diffs(self) -> list[Diff]:
        """Of kernels and of the Programs, where they differ."""
        found = [diff for pair in self._pairs if (diff := self._diff(pair))]
        for subject in PROGRAMS:
            old, new = (side.programs.get(subject) for side in (self.old, self.new))
            if (old is None) != (new is None):
                what: What = "added" if old is None else "gone"
                found.append(self._made(subject, what, old or new or ""))
            elif text := program_diff(self.old, self.new, subject):
                found.append(self._made(subject, "changed", text))
        return found

    @cached_property
    def _pairs(self) -> list[Pair]:
        return match_kernels(self.old, self.new)

    @cached_property
    def _runs(self) -> list[Runs]:
        return list(compared_runs(self.old, self.new, self._pairs))

    @cached_property
    def _blame(self) -> Blame:
        return Blame(self.old, self.new, self._pairs, self._runs)

    @cached_property
    def _one_sided(self) -> frozenset[str]:
        return one_sided(self._pairs)

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
        return empty_row(self.case, self.new.target)

    def _generated(self, subject: str, differs: bool, note: str) -> Row:
        """A row of tier 1."""
        verdict = Verdict.CHANGED if differs else Verdict.NO_CHANGE
        gate = "any"
        if self.expect_identical:
            gate = "±0"
            if differs:
                verdict = Verdict.REGRESSION
                note = f"{note}; {_NOT_EXPECTED}" if note else _NOT_EXPECTED
        return replace(
            self._base(), subject=subject, series="source", gate=gate, verdict=verdict, note=note
        )

    def _kernel(self, old: KernelSnapshot | None, new: KernelSnapshot | None) -> Iterator[Row]:
        """All rows of one kernel."""
        yield self._source(old, new)
        if new is None:
            return
        for runs in self._runs:
            if runs.subject == new.subject and (runs.differs or len(runs.there) > 1):
                yield self._running(runs)
        for series, before, after in paired_series(old, new, self._one_sided):
            yield self._figure(new.subject, series, before, after)

    def _source(self, old: KernelSnapshot | None, new: KernelSnapshot | None) -> Row:
        if old is None:
            assert new is not None
            return self._generated(new.subject, True, f"new: {new.id}")
        if new is None:
            return self._generated(old.subject, True, f"gone: {old.id}")
        differs, same_code = old.digest != new.digest, old.cubins == new.cubins
        if not differs and not same_code:
            # Some targets' assemblers give one of two equivalent codes, by chance: what counts is
            # whether any figure moves.
            moved = old.series != new.series
            note = "the source is the same, the machine code is not"
            kept = "; every figure of it is"
            return self._generated(new.subject, moved, note if moved else note + kept)
        what = [
            name
            for name, same in (
                ("source", old.text == new.text),
                ("launches", old.launches == new.launches),
            )
            if not same
        ]
        notes = [f"{' and '.join(what) or 'contraction'} changed"] if differs else []
        if differs and same_code and new.cubins:
            notes.append("machine code is the same")
        return self._generated(new.subject, differs, "; ".join(notes))

    def _running(self, runs: Runs) -> Row:
        """A binary that is there and never runs has no figure that shows it."""
        verdict = Verdict.CHANGED if runs.differs else Verdict.NO_CHANGE
        return replace(
            self._base(),
            tier=2,
            subject=runs.subject,
            series=f"runs ({runs.phase})",
            old=len(runs.old),
            new=len(runs.new),
            gate="the same",
            verdict=Verdict.REGRESSION if runs.stopped else verdict,
            note=runs.note,
        )

    def _programs(self) -> Iterator[Row]:
        """A row of each Program that a side has."""
        blamed = first_pass(self.old.passes, self.new.passes)
        yield self._program(PROGRAM, blamed)
        if DECODE_PROGRAM in {**self.old.programs, **self.new.programs}:
            blamed = blamed or first_pass(self.old.all_passes, self.new.all_passes)
            yield self._program(DECODE_PROGRAM, blamed)

    def _program(self, subject: str, blamed: str) -> Row:
        old, new = (side.programs.get(subject) for side in (self.old, self.new))
        if old is None or new is None:
            return self._generated(subject, True, "it is new" if old is None else "it is gone")
        differs = old != new
        notes = [blamed]
        if differs and not program_diff(self.old, self.new, subject):
            notes.append("its calls are the same but for the digests of kernels")
        elif notes[0] and not differs:  # how it came about is no part of what is generated
            notes.append("what comes out is the same")
        elif differs and not notes[0]:
            notes.append("the graph is the same after every pass: it is lowered otherwise")
        return self._generated(subject, differs, "; ".join(filter(None, notes)))

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
            if (series in old and series in new) or not _OF_PYTHON.search(series):
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
            return replace(row, verdict=Verdict.CHANGED, note=_one_side_only(series, old))
        verdict = judge(old, new, better, gate)
        if verdict is Verdict.NO_CHANGE:
            return row
        verdict, why = self._blame.reconsidered(subject, series, verdict)
        notes = filter(None, (why, self._blame.culprits(subject, series)))
        return replace(row, verdict=verdict, note="; ".join(notes))


def _subject(pair: Pair) -> str:
    kernel = pair[1] or pair[0]
    assert kernel is not None
    return kernel.subject


def _one_side_only(series: str, old: Number | None) -> str:
    if series.startswith("bits per "):  # nothing is loaded or stored there
        return "there was none" if old is None else "there is none any more"
    if old is None:
        return f"no baseline: record it with {RECORD}"
    return "it is gone: what was collected lacks it"

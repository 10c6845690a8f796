"""Tiers 1 and 2, compared: what is generated, kernel by kernel, and what it must cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ...autotune.verdicts import Verdict
from ...errors import UsageError
from .baseline import RECORD, Baseline
from .collect import Key, mismatches, working_tree
from .compared_case import ComparedCase, empty_row
from .model import Comparison, Diff, Row, Side
from .snapshot import Snapshot
from .suite import Case, Suite


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
        UsageError: the sides were made with other versions of Triton, torch or transformers, or
            no case is chosen.
    """
    started = time.perf_counter()
    cases = suite.chosen(only)
    if not cases:  # nothing is compared, which must not read as a pass
        raise UsageError(
            f"suite {suite.name}",
            expected="at least one case to compare",
            found="none in the suite" if not suite.cases else "none chosen",
            remedy="Name a case of the suite, or add one to it.",
        )
    side = new_side or working_tree()
    if old is not None:
        _check_versions(old, new, side)
    rows: list[Row] = []
    diffs: list[Diff] = []
    for case in cases:
        for target in case.targets:
            row = empty_row(case, target)
            before = old.snapshots.get((case.name, target)) if old is not None else None
            missing = _missing(old, before, new.get((case.name, target)), case)
            if missing:
                rows.append(replace(row, series="baseline", verdict=Verdict.MISSING, note=missing))
                continue
            after = new[case.name, target]
            assert before is not None
            compared = ComparedCase(suite, case, before, after, expect_identical)
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

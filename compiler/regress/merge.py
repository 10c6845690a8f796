"""Recording a part of a suite: the cases that were collected, beside those of the old baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...errors import UsageError
from .baseline import RECORD, Baseline
from .collect import Key, mismatches, versions
from .snapshot import Snapshot
from .suite import Suite


def merged(
    suite: Suite,
    old: Baseline | None,
    new: Mapping[Key, Snapshot],
    only: Sequence[str] | None,
) -> tuple[Suite, dict[Key, Snapshot]]:
    """The suite that is written, and its snapshots.

    Args:
        suite: as it is.
        old: the baseline that cases come from which are not in ``new``; None: there are none.
        new: what was collected.
        only: names that were; None for all.

    Raises:
        UsageError: the old baseline was made with other versions: its cases cannot stay.
    """
    if only is None:
        return suite, dict(new)
    if old is None:
        return replace(suite, cases=suite.chosen(only)), dict(new)
    refuse_others(old)
    wanted = {(case.name, target) for case in suite.cases for target in case.targets}
    kept = {key: snapshot for key, snapshot in old.snapshots.items() if key in wanted}
    both = {**kept, **new}
    present = [c for c in suite.cases if all((c.name, target) in both for target in c.targets)]
    return replace(suite, cases=tuple(present)), both


def refuse_others(old: Baseline) -> None:
    """Refuses a baseline of other versions: its cases cannot stay beside new ones.

    Raises:
        UsageError: with what differs.
    """
    if differences := mismatches(old.side.versions, versions()):
        raise UsageError(
            f"baseline {old.side.label}",
            expected="the versions of this environment, for its other cases to stay",
            found=", ".join(differences),
            remedy=f"Record all of it: {RECORD}.",
        )

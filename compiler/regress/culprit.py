"""What a bisection found: the commit, and where within it the difference begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .baseline import Baseline
from .compare import compare_snapshots
from .matching import match_kernels, program_diff
from .model import Diff, Side
from .pass_diff import first_changed_pass, stops_before
from .snapshot import PROGRAMS, Snapshot
from .suite import Suite
from .wording import clean, one_line, quantity
from .worktrees import SHOWN

Stage = Literal["capture", "pass", "codegen", "machine code", "compiler", "runtime", "unknown"]
_SHOWN_LINES = 30
_WIDTH = 150
_WORDS: dict[Stage, str] = {
    "capture": "capture or lowering: the graph differs before any pass",
    "pass": "a pass",
    "codegen": "code generation: the graphs are the same after every pass",
    "machine code": "the compiler or its options: sources are the same, machine code is not",
    "compiler": "compiling itself, or how costs are counted: nothing that is generated differs",
    "runtime": "the runtime: nothing that is generated differs",
    "unknown": "not known",
}


@dataclass(frozen=True, slots=True)
class Within:
    """Where in a commit a difference begins.

    Attributes:
        stage: what makes the first thing that differs.
        pass_name: where that is a pass.
        pass_limit: TILEWRIGHT_PASS_LIMIT that stops just before that pass.
        note: more of it, in words.
        kernels: whose source, launches or machine code differ; Programs whose calls do.
        diffs: of all that is generated.
    """

    stage: Stage
    pass_name: str | None = None
    pass_limit: int | None = None
    note: str = ""
    kernels: tuple[str, ...] = ()
    diffs: tuple[Diff, ...] = ()


@dataclass(frozen=True, slots=True)
class Culprit:
    """What made a series worse.

    Attributes:
        series: its name.
        commit: full hash; where others may be meant too, the first that was found bad.
        subject, author, date: of the commit.
        values: (commit, value) of those that were looked at, in the order of history, the good
            one first; None where there is no value, and ``skipped`` says why. Of a timed series it
            is the ratio to the good commit.
        pass_name, pass_limit, stage, note, kernels, diffs: as of `Within`.
        candidates: all commits that it may be: one, unless neighbours could not be looked at.
        unit: of the values.
        skipped: (commit, why it has no value).
    """

    series: str
    commit: str
    subject: str
    author: str
    date: str
    values: tuple[tuple[str, float | None], ...]
    pass_name: str | None
    pass_limit: int | None
    stage: Stage
    kernels: tuple[str, ...]
    diffs: tuple[Diff, ...]
    candidates: tuple[str, ...]
    unit: str = ""
    note: str = ""
    skipped: tuple[tuple[str, str], ...] = ()


def explain(suite: Suite, old: Snapshot, new: Snapshot, timed: bool) -> Within:
    """Where the first thing that differs between two commits is made.

    Args:
        suite: with the case.
        old, new: snapshots of the case on one target, of the last good and the first bad commit.
        timed: whether what is worse was measured on a device.
    """
    made, coded = _differing(old, new)
    kernels, diffs = tuple(dict.fromkeys((*made, *coded))), _diffs(suite, old, new)
    blamed = first_changed_pass(old.passes, new.passes)
    blamed = blamed or first_changed_pass(old.all_passes, new.all_passes)
    if blamed is not None:
        name, limit, note = blamed
        stage: Stage = "capture" if name is None else "pass"
        return Within(stage, name, limit, note, kernels, diffs)
    if made:
        return Within("codegen", kernels=kernels, diffs=diffs)
    if coded:
        return Within("machine code", kernels=kernels, diffs=diffs)
    return Within("runtime" if timed else "compiler", diffs=diffs)


def _differing(old: Snapshot, new: Snapshot) -> tuple[list[str], list[str]]:
    """What is generated otherwise, and the kernels of which only the machine code differs."""
    made, coded = [], []
    for before, after in match_kernels(old, new):
        kernel = after or before
        assert kernel is not None
        if before is None or after is None or before.digest != after.digest:
            made.append(kernel.subject)
        elif before.cubins != after.cubins:
            coded.append(kernel.subject)
    programs = [subject for subject in PROGRAMS if program_diff(old, new, subject)]
    return [*made, *programs], coded


def _diffs(suite: Suite, old: Snapshot, new: Snapshot) -> tuple[Diff, ...]:
    key = (new.case, new.target)
    before = Baseline(Side("good", versions=old.versions), suite.name, suite.digest, {key: old})
    side = Side("bad", versions=new.versions)
    return compare_snapshots(suite, before, {key: new}, new_side=side).diffs


def render_culprit(culprit: Culprit) -> str:
    """Plain text for a terminal: what, where within it, what was looked at, how code differs."""
    head = [one_line(line, _WIDTH) for line in _head(culprit)]
    return "\n".join((*head, *_diff_lines(culprit.diffs)))


def _head(culprit: Culprit) -> Iterator[str]:
    yield f"series: {culprit.series}"
    yield f"commit: {culprit.commit[:SHOWN]} {culprit.subject}"
    yield f"author: {culprit.author}, {culprit.date}"
    others = [commit[:SHOWN] for commit in culprit.candidates if commit != culprit.commit]
    if others:
        yield f"or one of {', '.join(others)}: they could not be looked at"
    yield f"within: {_within(culprit)}"
    if culprit.kernels:
        yield f"differ: {', '.join(culprit.kernels)}"
    yield ""
    reasons = dict(culprit.skipped)
    for commit, value in culprit.values:
        words = quantity(value, culprit.unit) if value is not None else "skipped"
        reason = f": {reasons[commit]}" if commit in reasons else ""
        mark = " ← the culprit" if culprit.candidates == (commit,) else ""
        yield f"{commit[:SHOWN]} {words}{reason}{mark}"


def _within(culprit: Culprit) -> str:
    if culprit.pass_name is None:
        return _WORDS[culprit.stage] + (f": {culprit.note}" if culprit.stage == "unknown" else "")
    return f"pass {culprit.pass_name} {culprit.note}; {stops_before(culprit.pass_limit)}"


def _diff_lines(diffs: Sequence[Diff]) -> Iterator[str]:
    """The start of one diff: of what is changed rather than of what is new."""
    if not diffs:
        return
    first = min(diffs, key=lambda diff: diff.what != "changed")
    lines = clean(first.text).strip("\n").split("\n")
    yield ""
    yield f"{first.subject} {first.what}:"
    yield from (f"  {line[:_WIDTH]}" for line in lines[:_SHOWN_LINES])
    if len(lines) > _SHOWN_LINES:
        yield f"  … {len(lines) - _SHOWN_LINES} more lines"
    if len(diffs) > 1:
        yield f"and {len(diffs) - 1} more diffs (--json has them all)"


def culprit_data(culprit: Culprit) -> dict[str, Any]:
    """As JSON."""
    data = asdict(culprit)
    for key in ("values", "skipped"):
        what = "value" if key == "values" else "reason"
        data[key] = [{"commit": commit, what: found} for commit, found in data[key]]
    return data

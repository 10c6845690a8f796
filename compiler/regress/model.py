"""What a comparison says, as plain data: every report is written from this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ...autotune.verdicts import FAILING, Interval, Verdict

Better = Literal["lower", "higher", "equal"]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two that are compared.

    Attributes:
        label: for reading: a folder, a commit, "working tree".
        commit: full hash, where it is known.
        recorded: when, ISO 8601 in UTC.
        reason: why the baseline was set, in the words of who did.
        versions: of the packages that decide what is generated.
        device: the GPU that was measured; None for what needs none.
    """

    label: str
    commit: str | None = None
    recorded: str | None = None
    reason: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One series, compared.

    Attributes:
        tier: 1 what is generated, 2 what it must cost, 3 what it takes.
        case: of the suite.
        target: device compiled for.
        subject: the kernel or the phase ("decode step", "prefill", "compile") that is to blame.
        series: what of it: "registers", "launches", "time".
        owner: who is to be asked.
        unit: "", "bytes", "s", …
        better: which way is good; "equal" where any difference is one.
        old, new: values; None where a side lacks the series.
        ratio: new over old, where it was measured.
        gate: the threshold in words: "+0", "+5%", "2%".
        verdict: the outcome.
        note: whatever helps to understand it.
    """

    tier: int
    case: str
    target: str
    subject: str
    series: str
    owner: str
    unit: str
    better: Better
    old: float | None
    new: float | None
    gate: str
    verdict: Verdict
    ratio: Interval | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Diff:
    """One generated thing that differs.

    Attributes:
        case, target: of the suite.
        subject: a kernel, or "program".
        what: how.
        text: a unified diff, or what was added or removed.
    """

    case: str
    target: str
    subject: str
    what: Literal["changed", "added", "gone"]
    text: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that a comparison found.

    Attributes:
        suite: its name.
        old, new: the sides.
        rows: every series, in the suite's order.
        diffs: of generated code.
        seconds: that it took.
        strict: whether what is not decidable fails too.
    """

    suite: str
    old: Side
    new: Side
    rows: tuple[Row, ...]
    diffs: tuple[Diff, ...] = ()
    seconds: float = 0.0
    strict: bool = False

    def of(self, *verdicts: Verdict) -> tuple[Row, ...]:
        """The rows of these verdicts."""
        return tuple(row for row in self.rows if row.verdict in verdicts)

    @property
    def findings(self) -> tuple[Row, ...]:
        """The rows that make it fail."""
        failing = FAILING | {Verdict.UNDECIDABLE} if self.strict else FAILING
        return self.of(*failing)

    @property
    def exit_code(self) -> int:
        """0 good, 1 a finding."""
        return int(bool(self.findings))

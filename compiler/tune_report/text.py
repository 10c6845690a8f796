"""Studies in words, and as tables of the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...autotune.study_report import TOO_FEW, StudyReport

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 3  # failures of one status


def title_of(report: StudyReport) -> str:
    """The kernel and the problem where the study says them, else its name."""
    template = report.problem.get("template")
    return f"{template} {problem_of(report)}" if template else report.name


def problem_of(report: StudyReport) -> str:
    """The facts of the problem: ``k=4096 n=6144``."""
    facts = report.problem.get("problem", {})
    return " ".join(f"{name}={value}" for name, value in facts.items() if value not in ("", 0))


def gain_of(report: StudyReport) -> str:
    """How much faster than the default the best is: ``1.100×``; a dash where nothing has times."""
    best = report.best
    return "–" if best is None or not best.ratio else f"{1 / best.ratio:.3f}×"


def print_reports(reports: Sequence[StudyReport], console: Console) -> None:
    """A row for each study, and what each has to say."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "study", "tried", "of", "best gain", "prior", "failed", "open", "by"):
        table.add_column(name, justify="left" if name == "study" else "right")
    for number, report in enumerate(reports, start=1):
        table.add_row(str(number), *_cells(report))
    console.print(table, markup=False)
    for number, report in enumerate(reports, start=1):
        console.print()
        for line in [f"{number}  {title_of(report)}", *details(report)]:
            console.print(line, markup=False, soft_wrap=True)


def _cells(report: StudyReport) -> tuple[str, ...]:
    ranks = report.rank_correlation
    return (
        title_of(report),
        str(len(report.tried)),
        "?" if report.coverage is None else str(report.coverage.valid),
        gain_of(report),
        "" if ranks is None else f"{ranks:.2f}",
        str(sum(map(len, report.failures.values()))),
        str(report.running + report.waiting),
        str(report.processes),
    )


def details(report: StudyReport) -> list[str]:
    """Course, importances, predictions, coverage and failures of a study, a line or a few each."""
    lines = [f"   study        {report.name}"]
    steps = ", ".join(f"{number}: {ratio:.3f}" for number, ratio in report.history)
    lines.append(f"   best by trial {steps or 'none has times'} (time over the default's)")
    if report.best is not None:
        lines.append(f"   best config  {report.best.outcome.config}")
    if report.choice is not None:
        lines.append(f"   chosen       {report.choice.config} ({report.choice.reason})")
    shares = "  ".join(f"{name} {share:.0%}" for name, share in report.importances.items())
    lines.append(f"   importance   {shares or TOO_FEW}")
    ranks = report.rank_correlation
    told = "too few" if ranks is None else f"rank correlation {ranks:.2f}"
    lines.append(f"   prior        {len(report.predictions)} predictions, {told}")
    if report.coverage is None:
        lines.append("   coverage     the study does not say what its space is")
    else:
        lines += [f"   {line}" for line in str(report.coverage).splitlines()]
    for status, ones in report.failures.items():
        lines.append(f"   {status.replace('_', ' ')}: {len(ones)}")
        lines += [f"     {o.outcome.config}: {o.outcome.reason}" for o in ones[:_SHOWN]]
        lines += [f"     and {len(ones) - _SHOWN} more"] if len(ones) > _SHOWN else []
    return lines

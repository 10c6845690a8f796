"""``tilewright regress record | compare | history | bisect``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from .console import note, out, print_json, progress
from .options import JsonOption, check_places

if TYPE_CHECKING:
    from ..regress.data import SeriesPlot
    from ..regress.model import Comparison
    from ..regress.run import Outcome
    from ..regress.suite import Suite

SUITE = Path("benchmarks/suite.toml")
BASELINES = "baselines"
"""The folder of baselines beside a suite file."""

regress_app = typer.Typer(
    help="Watch generated code, what it must cost and what it takes.",
    epilog="Exit codes: 0 good, 1 a finding, 2 bad input, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

SuiteArgument = Annotated[Path, typer.Argument(help="The suite, a TOML file.")]
BaselineOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help=f"Folder of recorded baselines; by default {BASELINES}/ beside the suite.",
        show_default=False,
    ),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A case; repeat it for more.", show_default=False),
]
MarkdownOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write a pull-request comment.", show_default=False),
]
HtmlOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a page with plots.", show_default=False)
]
JunitOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write JUnit XML.", show_default=False)
]
SaveOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the JSON there.", show_default=False)
]
IdenticalOption = Annotated[
    bool,
    typer.Option(
        "--expect-identical", help="Fail on any difference of what is generated: for refactors."
    ),
]
OldOption = Annotated[
    Path | None,
    typer.Option(
        metavar="CHECKOUT",
        help="A working tree to compare with: its code records the baseline, unless there is a "
        "--baseline; with --gpu it is timed against.",
        show_default=False,
    ),
]
PinnedOption = Annotated[
    Path | None,
    typer.Option(
        metavar="CHECKOUT", help="An old one to time against as well.", show_default=False
    ),
]
GpuOption = Annotated[bool, typer.Option("--gpu", help="Time old and new on this machine's GPU.")]
BudgetOption = Annotated[
    float, typer.Option(metavar="SECONDS", help="Of measuring, for each checkout or commit.")
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Fail on what is not decidable too.")]
AppendOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Append the results there, for tilewright regress history.",
        show_default=False,
    ),
]


@regress_app.command("record")
def record(
    suite: SuiteArgument = SUITE,
    reason: Annotated[
        str, typer.Option(help="Why the baseline changes, in words; kept with it.")
    ] = "",
    baseline: BaselineOption = None,
    only: OnlyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record what the suite generates, and what that must cost, as the new baseline."""
    from ..regress.baseline import read_baseline, write_baseline
    from ..regress.collect import collect
    from ..regress.merge import merged, refuse_others
    from ..regress.suite import load_suite

    watched = load_suite(suite)
    folder = _folder(baseline or suite.parent / BASELINES)
    if not reason.strip():
        raise UsageError(
            "option --reason",
            expected="why the baseline changes, in words",
            found="none",
            remedy="Run it with --reason '…'; whoever reads the baseline sees it.",
        )
    before = read_baseline(folder) if only else None
    if before is not None:
        refuse_others(before)  # now, not after minutes of collecting
    with progress(f"record {watched.name}") as advance:
        new = collect(watched, only or None, advance)
    written, snapshots = merged(watched, before, new, only or None)
    write_baseline(folder, written, snapshots, reason)
    cases = sorted({case for case, _ in new})
    kept = sorted({case for case, _ in snapshots} - set(cases))
    if as_json:
        print_json({"baseline": str(folder), "cases": cases, "snapshots": len(new), "kept": kept})
        return
    told = f"recorded {len(new)} snapshots of {', '.join(cases)} in {folder}"
    out().print(told + (f"; kept {', '.join(kept)}" if kept else ""), markup=False, soft_wrap=True)


@regress_app.command("compare")
def compare(
    suite: SuiteArgument = SUITE,
    baseline: BaselineOption = None,
    expect_identical: IdenticalOption = False,
    only: OnlyOption = None,
    old: OldOption = None,
    pinned: PinnedOption = None,
    gpu: GpuOption = False,
    budget: BudgetOption = 60.0,
    strict: StrictOption = False,
    history: AppendOption = None,
    markdown: MarkdownOption = None,
    junit: JunitOption = None,
    html: HtmlOption = None,
    save: SaveOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare this code with a baseline, or with another checkout."""
    from ..regress.checkout import Checkout
    from ..regress.run import Request, run_comparison
    from ..regress.suite import load_suite

    watched = load_suite(suite)
    before = Checkout.at(old) if old is not None else None
    if baseline is None and old is None:
        baseline = suite.parent / BASELINES
    check_places(
        {"markdown": markdown, "junit": junit, "html": html, "save": save, "history": history}
    )
    request = Request(
        watched,
        _folder(baseline) if baseline is not None else None,
        before,
        Checkout.at(pinned) if pinned is not None else None,
        only or None,
        expect_identical,
        gpu,
        budget,
        strict,
    )
    with progress(f"compare {watched.name}") as advance:
        outcome = run_comparison(request, advance)
    found = outcome.comparison
    _write_reports(found, markdown=markdown, junit=junit, html=html, save=save)
    if history is not None:
        _append(history, outcome, watched)
    if as_json:
        from ..regress.data import comparison_data

        print_json(comparison_data(found))
    else:
        from ..regress.terminal import print_comparison

        print_comparison(found, out())
    if found.exit_code:
        raise typer.Exit(found.exit_code)


@regress_app.command("history")
def history(
    store: Annotated[Path, typer.Argument(metavar="FILE", help="Results, one run a line.")],
    device: Annotated[
        str | None, typer.Option(help="Whose entries; by default those of each.")
    ] = None,
    max_age: Annotated[
        float, typer.Option(metavar="DAYS", help="A newest entry older than this is a failure.")
    ] = 14.0,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Judge from there on (ISO 8601): what came before is accepted.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take thresholds from there.", show_default=False),
    ] = None,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look for change points and slow drift over all results of FILE."""
    from ...autotune.history import HistoryRule, read_history
    from ...autotune.verdicts import FAILING
    from ..regress.data import plot_data
    from ..regress.suite import load_suite
    from ..regress.trend import judged_plots

    check_places({"markdown": markdown, "html": html})
    if store.is_dir():
        raise UsageError(
            f"history {store}",
            expected="a file of recorded runs",
            found="a folder",
            remedy="Name the file in it that tilewright regress compare --history wrote.",
        )
    if not max_age > 0:
        raise UsageError(
            "option --max-age",
            expected="more than 0 days",
            found=f"{max_age:g}",
            remedy="Give it 14.",
        )
    start = _moment(since) if since is not None else None
    read = read_history(store)
    if start is not None:
        read = read.since(start)
    for number, reason in read.broken:
        note(f"{store}, line {number} is set aside: {reason}")
    plots = judged_plots(
        read,
        device,
        HistoryRule(max_age_days=max_age),
        load_suite(suite) if suite is not None else None,
    )
    _write_history(plots, store.name, markdown=markdown, html=html)
    if as_json:
        print_json({"broken": read.broken, "series": [plot_data(plot) for plot in plots]})
    else:
        _print_plots(plots)
    if any(plot.verdict in FAILING for plot in plots):
        raise typer.Exit(1)


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"option --since {text}",
            expected="a moment in ISO 8601, as 2026-11-26 or 2026-11-26T12:00:00+00:00",
            found=repr(text),
            remedy="Take the time of an entry of the history.",
        ) from None


@regress_app.command("bisect")
def bisect(
    series: Annotated[str, typer.Argument(help="As reports name it: CASE.TARGET/SUBJECT/SERIES.")],
    good: Annotated[str, typer.Option(help="A commit where it is still good.")],
    bad: Annotated[str, typer.Option(help="A later one where it is not.")] = "HEAD",
    suite: Annotated[Path, typer.Option(metavar="FILE", help="The suite.")] = SUITE,
    budget: BudgetOption = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Find the commit, and the pass within it, that made a series worse."""
    from ..regress.bisect import bisect_series, culprit_data, render_culprit
    from ..regress.run import check_budget
    from ..regress.suite import load_suite

    check_budget(budget)
    with progress(f"bisect {series}") as advance:
        found = bisect_series(
            Path.cwd(), load_suite(suite), series, good, bad, budget=budget, advance=advance
        )
    if as_json:
        print_json(culprit_data(found))
    else:
        out().print(render_culprit(found), markup=False, soft_wrap=True)


def _folder(baseline: Path) -> Path:
    if baseline.is_file():
        raise UsageError(
            f"baseline {baseline}",
            expected="a folder",
            found="a file",
            remedy="Name the folder that tilewright regress record writes.",
        )
    return baseline


def _write_reports(
    found: Comparison,
    *,
    markdown: Path | None,
    junit: Path | None,
    html: Path | None,
    save: Path | None,
) -> None:
    import json

    from ...formats.atomic import write_atomic
    from ..regress.data import comparison_data
    from ..regress.junit import render_junit
    from ..regress.markdown import render_markdown
    from ..regress.page import render_page

    if markdown is not None:
        write_atomic(markdown, render_markdown(found))
    if junit is not None:
        write_atomic(junit, render_junit(found))
    if html is not None:
        write_atomic(html, render_page(found, (), f"{found.suite}: regressions"))
    if save is not None:
        write_atomic(save, json.dumps(comparison_data(found), indent=1) + "\n")


def _append(path: Path, outcome: Outcome, suite: Suite) -> None:
    from ...autotune.history import append_entry
    from ..regress.trend import entries_of

    for entry in entries_of(outcome, suite):
        append_entry(path, entry)


def _write_history(
    plots: Sequence[SeriesPlot], title: str, *, markdown: Path | None, html: Path | None
) -> None:
    from ...formats.atomic import write_atomic
    from ..regress.markdown import render_history
    from ..regress.page import render_page

    if markdown is not None:
        write_atomic(markdown, render_history(plots, title=title))
    if html is not None:
        write_atomic(html, render_page(None, plots, title))


def _print_plots(plots: Sequence[SeriesPlot]) -> None:
    from collections import Counter

    from rich.text import Text

    from ...autotune.verdicts import FAILING, Verdict
    from .tables import plain_table

    order = list(Verdict)  # what fails is last, where the eye is
    quiet = (Verdict.NO_CHANGE, Verdict.UNDECIDABLE)
    shown = [plot for plot in plots if plot.change_points or plot.verdict not in quiet]
    shown.sort(key=lambda plot: (plot.verdict in FAILING, -order.index(plot.verdict)))
    if shown:
        table = plain_table(("series", "verdict", "points", "changes", "why"), left=2)
        table.columns[-1].justify = "left"
        for plot in shown:
            counts = str(len(plot.points)), str(len(plot.change_points))
            table.add_row(*map(Text, (plot.name, str(plot.verdict), *counts, plot.note)))
        out().print(table)
    found = Counter(plot.verdict for plot in plots)
    undecided = {plot.note for plot in plots if plot.verdict is Verdict.UNDECIDABLE}
    words = [f"{found[verdict]} {verdict}" for verdict in order if found[verdict]]
    why = f"; {undecided.pop()}" if len(undecided) == 1 else ""
    out().print(f"{len(plots)} series: {', '.join(words)}{why}", markup=False, soft_wrap=True)

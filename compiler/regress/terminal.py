"""A comparison in the terminal: findings first, the summary last, where the eye is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...autotune.verdicts import Verdict
from ..cli.tables import facts_table, plain_table
from .model import Comparison
from .wording import (
    ACCEPT,
    Line,
    causes,
    change,
    clean,
    headline,
    kernel_diffs,
    one_line,
    outcome,
    places,
    ratio,
    shortened,
    side,
    versions,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

SHOWN_ROWS = 40
SHOWN_WINS = 10
SHOWN_DIFFS = 6
SHOWN_LINES = 16
LINE_WIDTH = 150
NAME_WIDTH = 48
CELL_WIDTH = 80
NOTE_WIDTH = 240
COLUMNS = ("kernel or phase", "where", "what", "old → new", "ratio", "gate", "owner", "note")
STYLES = {"+": "green", "-": "red", "@": "cyan"}

# What is shown of each verdict: its title, its style, the most rows.
PARTS = (
    (Verdict.REGRESSION, "regressions", "red", SHOWN_ROWS),
    (Verdict.MISSING, "missing", "red", SHOWN_ROWS),
    (Verdict.UNDECIDABLE, "not decidable with this noise", "yellow", SHOWN_WINS),
    (Verdict.CHANGED, "changed", "yellow", SHOWN_WINS),
    (Verdict.IMPROVEMENT, "improvements", "green", SHOWN_WINS),
)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints tables of all that is not unchanged, short diffs, and one line of summary last."""
    from rich.text import Text

    for verdict, title, style, most in PARTS:
        rows = comparison.of(verdict)
        if rows:
            lines = shortened(rows)
            console.print(_table(lines[:most], title, style))
            _print_rest(console, sum(line.count for line in lines[most:]))
    _print_diffs(comparison, console)
    console.print(_sides(comparison))
    if comparison.exit_code:
        console.print(Text(f"if it is meant: {ACCEPT}", style="dim"), soft_wrap=True)
    passed = comparison.rows and not comparison.exit_code
    style = "bold green" if passed else "bold red"
    word = outcome(comparison).lower()
    console.print(Text(word, style=style).append(f": {headline(comparison)}", style="not bold"))


def _table(lines: Sequence[Line], title: str, style: str) -> Table:
    from rich.text import Text

    table = plain_table(COLUMNS, left=3)
    table.title = Text(title, style=f"bold {style}")
    table.columns[-1].justify = "left"
    table.columns[-1].no_wrap = False
    for line in lines:
        table.add_row(*map(Text, _cells(line)))
    return table


def _cells(line: Line) -> list[str]:
    row, place = line.row, f"{line.row.case} on {line.target}"
    texts, note = [place, row.series, change(row), ratio(row), row.gate, row.owner], row.note
    if line.more:
        texts, note = [place, f"and {line.more} more of it", "", "", "", ""], ""
    cells = (one_line(row.subject, NAME_WIDTH), *(one_line(text, CELL_WIDTH) for text in texts))
    return [*cells, one_line(note, NOTE_WIDTH)]


def _print_rest(console: Console, count: int) -> None:
    if count > 0:
        console.print(f"and {count} more (--json has them all)")
    console.print()


def _print_diffs(comparison: Comparison, console: Console) -> None:
    from rich.text import Text

    groups = kernel_diffs(comparison)
    for group in groups[:SHOWN_DIFFS]:
        title = Text(one_line(group.diff.subject, NAME_WIDTH), style="bold")
        title.append(f" {group.diff.what}: {one_line(places(group), LINE_WIDTH)}", style="not bold")
        console.print(title)
        lines = clean(group.diff.text).strip("\n").split("\n")
        for line in lines[:SHOWN_LINES]:
            console.print(_diff_line(line), soft_wrap=True)
        if len(lines) > SHOWN_LINES:
            console.print(f"  … {len(lines) - SHOWN_LINES} more lines", style="dim")
        console.print()
    if len(groups) > SHOWN_DIFFS:
        console.print(f"and {len(groups) - SHOWN_DIFFS} more diffs (--html shows them all)\n")


def _diff_line(line: str) -> Text:
    from rich.text import Text

    text = line if len(line) <= LINE_WIDTH else f"{line[: LINE_WIDTH - 1]}…"
    return Text(f"  {text}", style=STYLES.get(line[:1], ""))


def _sides(comparison: Comparison) -> Table:
    facts = [(name, one_line(side(getattr(comparison, name)), 200)) for name in ("old", "new")]
    found = causes(comparison)
    facts += [
        ("differs", one_line(f"{words} ({place})", NOTE_WIDTH))
        for words, place in found[:SHOWN_WINS]
    ]
    facts += [
        (one_line(name, NAME_WIDTH), one_line(f"{old} → {new}", CELL_WIDTH))
        for name, old, new in versions(comparison)
        if old != new
    ]
    return facts_table(facts)

"""Tables of the verbs, in one look."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Labels in front of facts."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for label, fact in facts:
        table.add_row(label, Text(fact))
    return table


def plain_table(columns: Sequence[str], title: str | None = None, left: int = 1) -> Table:
    """A table without lines; the first ``left`` columns are text, the others figures."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    for index, name in enumerate(columns):
        is_text = index < left
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text)
    return table

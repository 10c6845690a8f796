"""One HTML page of a comparison and of histories: holds all it shows, as JSON, fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files

from ...version import __version__
from .data import SeriesPlot, comparison_data, plot_data
from .model import Comparison, Row
from .wording import (
    ACCEPT,
    change,
    clean,
    headline,
    kernel_diffs,
    places,
    ratio,
    side,
    versions,
)

PAGE = "page"
PART = re.compile(r"@@([A-Z]+)@@")
PERCENT = re.compile(r"([+-]?)\s*(\d+(?:\.\d+)?)\s*%")


def render_page(comparison: Comparison | None, plots: Sequence[SeriesPlot], title: str) -> str:
    """The page as HTML text: a comparison, histories, or both."""
    folder = files(__package__) / PAGE
    text, style, script = (
        (folder / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js")
    )
    # In a script element only "<" can end the data early; JSON may write it otherwise.
    data = json.dumps(page_data(comparison, plots, title), separators=(",", ":"), allow_nan=False)
    script = f"\n{script}"
    parts = {
        "TITLE": html.escape(clean(title)),
        "STYLE": style,
        "SCRIPT": script,
        # The browser runs this script and no other, whatever the data say.
        "HASH": base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        "DATA": data.replace("<", "\\u003c"),
    }
    # In one go: a part may itself hold what looks like a place for another.
    return PART.sub(lambda found: parts[found[1]], text)


def page_data(
    comparison: Comparison | None, plots: Sequence[SeriesPlot], title: str
) -> dict[str, object]:
    """All that the page shows, as plain data; ``comparison`` in it reads back."""
    data: dict[str, object] = {
        "version": __version__,
        "title": title,
        "comparison": None,
        "plots": [plot_data(plot) for plot in plots],
    }
    if comparison is not None:
        data["comparison"] = comparison_data(comparison)
        data["headline"] = headline(comparison)
        data["shown"] = [[change(row), ratio(row), gate_band(row)] for row in comparison.rows]
        data["facts"] = _facts(comparison)
        data["diffs"] = [
            [group.index, len(group.places), places(group)] for group in kernel_diffs(comparison)
        ]
    return data


def gate_band(row: Row) -> tuple[float, float] | None:
    """The ratios that the gate of a measured row lets pass, None where it is no percentage."""
    found = PERCENT.search(row.gate)
    if row.ratio is None or found is None:
        return None
    share = float(found[2]) / 100
    return 1 - share, 1 + share


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    facts = [("old", side(comparison.old)), ("new", side(comparison.new))]
    facts += [
        (name, old if old == new else f"{old} → {new}") for name, old, new in versions(comparison)
    ]
    return [*facts, ("to accept", ACCEPT)]

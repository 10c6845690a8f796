"""``tilewright tune report --html``: all studies on one page that fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from ...autotune.study_report import ENOUGH, StudyReport
from ...version import __version__
from . import charts
from .text import gain_of, problem_of, title_of

PAGE = "page"


def render(template: str, **values: object) -> str:
    """A template with the macro ``drawn(chart, label)`` for charts; values are written as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(gain=gain_of, problem=problem_of, title=title_of)
    macro = (files(__package__) / PAGE / "page.chart.html").read_text("utf-8")
    return environment.from_string(macro + template).render(charts=charts, **values)


def render_page(reports: Sequence[StudyReport], storage: str) -> str:
    """The page as HTML text; whatever the studies hold is written as text, never as markup."""
    folder = files(__package__) / PAGE
    template, style = ((folder / name).read_text("utf-8") for name in ("page.html", "page.css"))
    return render(
        template,
        reports=reports,
        storage=storage,
        version=__version__,
        style=style,
        enough=ENOUGH,
    )

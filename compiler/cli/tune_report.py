"""``tilewright tune report``: what the searches in a storage came to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import UsageError
from .console import note, out, print_json
from .options import JsonOption, check_places


def report(
    storage: Annotated[
        str,
        typer.Option(
            help="What tilewright tune --storage was given: a journal file, a database URL, or "
            "grpc://host:port.",
            show_default=False,
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write one page that holds all it shows.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the course of each search in a storage: history, importance of parameters, coverage of
    the space, what was predicted against what was measured, and what failed.
    """
    from ...autotune.study_report import read_studies

    check_places({"html": html})
    found = read_studies(storage)
    if html is not None:
        from ...formats.atomic import write_atomic
        from ..tune_report.page import render_page

        try:
            write_atomic(html, render_page(found, storage))
        except OSError as error:
            raise UsageError(
                f"option --html {html}",
                expected="a file that can be written",
                found=error.strerror or str(error),
                remedy="Choose another place.",
            ) from error
        note(f"written: {html}")
    if as_json:
        print_json([one.to_json() for one in found])
    elif html is None:
        from ..tune_report.text import print_reports

        print_reports(found, out())

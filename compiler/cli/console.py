"""What the verbs print with: figures on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...errors import TilewrightError
from ...settings import DEBUG

if TYPE_CHECKING:
    from rich.console import Console

    Advance = Callable[[str, float], None]

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def out() -> Console:
    """The console of results."""
    from rich.console import Console

    # Piped output keeps its lines whole; 160 columns hold every table of ours.
    width = None if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False, soft_wrap=False)


def err() -> Console:
    """The console of progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(data: object) -> None:
    """Data as JSON on stdout, and nothing else."""
    json.dump(data, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A dim line on stderr."""
    from rich.markup import escape

    err().print(f"[dim]{escape(text)}[/]", soft_wrap=True)


def print_warning(text: str) -> None:
    """A yellow line on stderr."""
    from rich.markup import escape

    err().print(f"[yellow]warning: {escape(text)}[/]", soft_wrap=True)


def print_error(error: TilewrightError) -> None:
    """An error as four labelled lines."""
    from rich.text import Text

    lines = (
        ("error", error.culprit),
        ("expected", error.expected),
        ("found", error.found),
        ("remedy", error.remedy),
    )
    for label, text in lines:
        line = Text(f"{label + ':':<10}", style="bold red").append(text, style="not bold red")
        err().print(line, soft_wrap=True)


def print_unexpected(error: Exception) -> None:
    """One line for an exception that is not ours, and how to see more."""
    from rich.text import Text

    message = str(error).strip().splitlines() or [""]
    line = f"{type(error).__name__}: {message[0]}  (TILEWRIGHT_DEBUG=1 shows the traceback)"
    err().print(Text(f"error:    {line}", style="red"), soft_wrap=True)


def print_traceback() -> None:
    """The traceback of the exception in flight, where TILEWRIGHT_DEBUG asks for it."""
    with contextlib.suppress(TilewrightError):  # a wrong value of the switch is what is reported
        if DEBUG.read() > 0:
            traceback.print_exc()


@contextmanager
def progress(title: str) -> Iterator[Advance]:
    """A progress bar on stderr, gone when its block ends.

    Yields:
        ``advance(phase, share)``: what begins now, and the share (0 to 1) that is done.
    """
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[phase]}"),
        TimeElapsedColumn(),
    )
    console = err()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=1.0, phase="")

        def advance(phase: str, share: float) -> None:
            bar.update(task, completed=share, phase=phase)

        yield advance

"""The command line, one module a verb; each imports what it needs when it runs."""

from __future__ import annotations


def main() -> None:
    """Runs the command line, and ends the process with its exit code.

    0 good, 1 a finding (a failed verification), 2 misuse or bad input, 130 interrupted.
    """
    from .app import app

    app(prog_name="tilewright")

"""The command line, one module a verb; each imports what it needs when it runs."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line, and ends the process with its exit code.

    0 good, 1 a finding (a failed verification), 2 misuse or bad input, 130 interrupted.
    """
    from .app import app
    from .console import INTERRUPTED

    try:
        app(prog_name="tilewright")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # CPython kills itself with SIGINT at exit, whatever the exit code, when a handled
            # KeyboardInterrupt has passed through code that was compiled from a string.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise

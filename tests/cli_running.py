"""Ways to run verbs of the command line in tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache

from typer import testing

testing._get_command = cache(testing._get_command)  # all verbs and options, made anew for each run

COMPILE = ("--backend", "eager", "--verify", "structure", "--max-model-len", "64")


def run(*args: object, **options: object):
    """A verb in this process: result with exit_code, stdout, stderr."""
    from tilewright.compiler.cli.app import app

    return testing.CliRunner().invoke(app, [str(arg) for arg in args], **options)


def spawn(*args: object, **options: object) -> subprocess.Popen:
    """A verb in a process of its own."""
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, "-m", "tilewright", *map(str, args)],
        # Who runs the tests in the background may have them ignore Ctrl-C, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def refused(result, *parts: str, code: int = 2) -> None:
    """The message has its four labels and these parts, and no traceback."""
    assert result.exit_code == code, result.output
    for part in ("error:", "expected:", "found:", "remedy:", *parts):
        assert part in result.stderr, (part, result.stderr)
    assert "Traceback" not in result.output

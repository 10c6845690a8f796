"""The table of verbs, and what holds for all: the shape of errors, exit codes, interrupts."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ...errors import TilewrightError
from ...version import __version__
from .bench import bench_app
from .compile import compile_model
from .console import INTERRUPTED, print_error, print_traceback, print_unexpected, print_warning
from .generate import generate
from .inspect import inspect_engine
from .models import models_app
from .quantize import quantize_model
from .regress import regress_app
from .serve import serve
from .targets import targets
from .tune import tune_app
from .verify import verify_engine

EPILOG = (
    "Exit codes: 0 good, 1 a finding, 2 bad input, 130 interrupted. "
    "TILEWRIGHT_DEBUG=1 shows tracebacks."
)


class Verbs(TyperGroup):
    """A group whose verbs end in one line a fact, never in a traceback that nobody asked for."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb; every exception becomes a message on stderr and an exit code, and every
        warning of ours a line.
        """
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _shown(warnings.showwarning)
                return super().invoke(ctx)
        except TilewrightError as error:
            print_traceback()
            print_error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            print("interrupted; nothing half-written is left", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            # The reader (head, less) has seen enough. stdout must not be flushed again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from error
        except Exception as error:
            if _is_typers_own(error):
                raise
            print_traceback()
            print_unexpected(error)
            raise typer.Exit(2) from error


def _shown(usual: Callable[..., None]) -> Callable[..., None]:
    """What shows a warning: the text alone of one that is meant for users."""

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if category is UserWarning:
            print_warning(str(message))
        else:
            usual(message, category, *where)

    return show


def _is_typers_own(error: Exception) -> bool:
    """Typer steers with exceptions of its own (Exit and Abort are RuntimeErrors)."""
    return type(error).__module__.startswith(("typer", "click"))


app = typer.Typer(
    cls=Verbs,
    help="Compiles PyTorch transformers into tuned inference engines.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tilewright {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    pass


app.command("compile")(compile_model)
app.command("quantize")(quantize_model)
app.command("generate")(generate)
app.command("serve")(serve)
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
app.command("inspect")(inspect_engine)
app.command("verify")(verify_engine)
app.add_typer(regress_app, name="regress")
app.add_typer(tune_app, name="tune")
app.command("targets")(targets)

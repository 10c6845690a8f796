"""The one registry of environment switches: every `TILEWRIGHT_*` name, its type and its meaning."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import UsageError

PREFIX = "TILEWRIGHT_"
VERIFY_LEVELS = ("off", "structure", "sample", "full")
MAX_DEBUG = 5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """The switches as they stand in the environment at one moment.

    Attributes:
        debug: 0 to 5; each rung adds to the one below: 1 passes and times, 2 kernels and GB/s,
            3 chosen configs, 4 kernel source, 5 the IR after each pass.
        dump: folder for numbered artifact files, None for no files.
        pass_limit: number of passes to run before stopping, for bisection; None runs them all.
        cache: folder of what may be rebuilt at any time.
        verify: overrides the `verify` argument of `compile`; None leaves it.
        threads: intra-op CPU threads of the backends; None leaves it to them.
        api_key: that clients of a server must send; None serves anybody.
    """

    debug: int
    dump: Path | None
    pass_limit: int | None
    cache: Path
    verify: str | None
    threads: int | None
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Switch(Generic[T]):
    """One environment variable.

    Attributes:
        name: the full name of the variable.
        default: the value where the variable is unset or empty.
        accepts: the values it takes, in words.
        meaning: what it changes, in words.
        parse: text to value; raises ValueError where the text is not acceptable.
        secret: whether the value is never shown.
    """

    name: str
    default: T
    accepts: str
    meaning: str
    parse: Callable[[str], T]
    secret: bool = False

    def read(self) -> T:
        """The value now.

        Raises:
            UsageError: the variable's text does not parse.
        """
        text = os.environ.get(self.name, "")
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError:
            raise UsageError(
                f"environment variable {self.name}",
                expected=self.accepts,
                found=repr(text),
                remedy=f"Unset {self.name}, or give it {self.accepts}.",
            ) from None


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise ValueError(text)
        return value

    return parse


def _level(text: str) -> str:
    if text not in VERIFY_LEVELS:
        raise ValueError(text)
    return text


DEBUG = Switch(
    "TILEWRIGHT_DEBUG",
    0,
    f"an integer from 0 to {MAX_DEBUG}",
    "print passes (1), kernels (2), configs (3), kernel source (4), IR after each pass (5)",
    _integer(0, MAX_DEBUG),
)
DUMP: Switch[Path | None] = Switch(
    "TILEWRIGHT_DUMP", None, "a folder", "write numbered artifact files there", Path
)
PASS_LIMIT: Switch[int | None] = Switch(
    "TILEWRIGHT_PASS_LIMIT",
    None,
    "an integer from 0",
    "stop after so many passes, to bisect a fault",
    _integer(0),
)
CACHE = Switch(
    "TILEWRIGHT_CACHE",
    Path("~/.cache/tilewright"),
    "a folder",
    "keep there what can be rebuilt at any time",
    Path,
)
VERIFY: Switch[str | None] = Switch(
    "TILEWRIGHT_VERIFY",
    None,
    " | ".join(VERIFY_LEVELS),
    "override the verify= argument of compile",
    _level,
)
THREADS: Switch[int | None] = Switch(
    "TILEWRIGHT_THREADS", None, "an integer from 1", "CPU threads of a backend", _integer(1)
)

API_KEY: Switch[str | None] = Switch(
    "TILEWRIGHT_API_KEY",
    None,
    "text",
    "the key that clients of `tilewright serve` must send",
    str,
    True,
)

SWITCHES: tuple[Switch[Any], ...] = (DEBUG, DUMP, PASS_LIMIT, CACHE, VERIFY, THREADS, API_KEY)


def current() -> Settings:
    """Read the switches from the environment, now.

    Raises:
        UsageError: a `TILEWRIGHT_*` variable has an unknown name, or a value that does not parse.
    """
    _refuse_unknown()
    dump = DUMP.read()
    return Settings(
        debug=DEBUG.read(),
        dump=dump.expanduser() if dump else None,
        pass_limit=PASS_LIMIT.read(),
        cache=CACHE.read().expanduser(),
        verify=VERIFY.read(),
        threads=THREADS.read(),
        api_key=API_KEY.read(),
    )


def describe() -> str:
    """A table of the switches as text: name, value now, default, what each accepts and means."""
    rows = [("variable", "now", "default", "accepts", "meaning")]
    rows += [(s.name, _shown(s), str(s.default), s.accepts, s.meaning) for s in SWITCHES]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)
    return "\n".join(line.rstrip() for line in lines)


def _shown(switch: Switch[Any]) -> str:
    text = os.environ.get(switch.name, "")
    return "(set)" if text and switch.secret else text


def _refuse_unknown() -> None:
    known = [switch.name for switch in SWITCHES]
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            raise UsageError(
                f"environment variable {name}",
                expected=f"one of {', '.join(known)}",
                found=name,
                remedy=f"Unset {name}, or correct its name.",
            )

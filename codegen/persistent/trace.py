"""When each program of the one launch met, began and ended each call of a step: a file of JSON,
which `tilewright inspect --html --trace` draws (compiler/inspect/timeline.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import UsageError
from .reading import Attention, Begin, Form, Shape, Step

MARKS = ("met", "begun", "done")
"""The times that are noted of each program and call."""
_FIELDS = ("title", "forms", "calls", "places", "times")
_KIND = "tilewright one launch, version 1"


@dataclass(frozen=True, slots=True)
class StepTrace:
    """A step.

    Attributes:
        title: what was run.
        forms: a name of each form of call.
        calls: the form of each call, in order.
        places: the multiprocessor of each program.
        times: of each program, `MARKS` of each call, in ns since the first of all.
    """

    title: str
    forms: tuple[str, ...]
    calls: tuple[int, ...]
    places: tuple[int, ...]
    times: tuple[tuple[int, ...], ...]

    def to_json(self) -> str:
        """The text of a trace file."""
        return json.dumps({"kind": _KIND, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, source: str) -> StepTrace:
        """The trace of a file whose name is ``source``.

        Raises:
            UsageError: it is none.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise _no_trace(source, str(error)) from error
        if not isinstance(data, dict) or data.get("kind") != _KIND:
            raise _no_trace(source, "something else")
        parts: tuple[Any, ...] = tuple(map(data.get, _FIELDS))
        title, forms, calls, places, times = parts
        named = isinstance(title, str) and isinstance(forms, list)
        if not named or not all(isinstance(form, str) for form in forms):
            raise _no_trace(source, "names that are missing")
        width = len(MARKS) * len(calls) if _are_numbers(calls) else 0
        fits = width and _are_numbers(places) and all(index < len(forms) for index in calls)
        fits = fits and isinstance(times, list) and len(times) == len(places) > 0
        if not fits or not all(_are_numbers(row) and len(row) == width for row in times):
            raise _no_trace(source, "numbers that do not fit each other")
        rows = tuple(map(tuple, times))
        return cls(title, tuple(forms), tuple(calls), tuple(places), rows)


def read_trace(path: Path) -> StepTrace:
    """The trace of a file.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _no_trace(str(path), str(error)) from error
    return StepTrace.from_json(text, str(path))


def trace_of(
    title: str,
    shape: Shape,
    steps: Sequence[Step],
    timeline: torch.Tensor,
    places: torch.Tensor,
) -> StepTrace:
    """The trace of a step.

    Args:
        title: what was run.
        shape: whose calls they are; ``steps`` are those that were noted.
        timeline: i64 [programs, calls, 3] in ns (`MARKS`).
        places: i32 [programs].
    """
    times = (timeline - timeline.min()).flatten(1).cpu().tolist()
    calls = tuple(step.form for step in steps)
    forms = tuple(map(form_name, shape.forms))
    return StepTrace(title, forms, calls, tuple(places.tolist()), tuple(map(tuple, times)))


def form_name(form: Form) -> str:
    """A form of call, for people."""
    if isinstance(form, Begin):
        return "embedding, cos and sin"
    if isinstance(form, Attention):
        return f"attention of {form.heads}/{form.kv_heads} heads"
    more = [word for word in ("norm", "gated", "residual", "chosen") if getattr(form, word)]
    codes = () if form.codes is None else (f"of {form.codes.bits} bits",)
    return " ".join((f"{form.n} x {form.k}", *codes, *more))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _no_trace(source: str, found: str) -> UsageError:
    return UsageError(
        f"trace {source}",
        expected="a file that PersistentDecode.trace was written to",
        found=found,
        remedy="Write one with benchmarks/bench_persistent.py --pictures FOLDER.",
    )

"""torch.export notes for each node of a graph where in a model it was made, and before it takes an
op apart looks for all ops that there are: a sixth of the time of a tiny model's capture. Here the
stack is read frame by frame, without pytest's below it made into text each time, and ops are looked
for once; what is noted, and what is found, stays. And a graph's code is compiled after each of
torch's passes, most of which change nothing: here, once.
"""

from __future__ import annotations

import sys
from functools import cache
from traceback import FrameSummary, StackSummary
from types import CodeType
from typing import Any

import torch
from torch._export import utils
from torch.fx import graph_module, proxy

_MATERIALIZE = utils._materialize_cpp_cia_ops
_registered: list[str] = []
_known: dict[tuple[object, ...], CodeType] = {}  # by source, and where it was traced


def hasten_export() -> None:
    """Once and for the whole process."""
    proxy.CapturedTraceback = Stack
    utils._materialize_cpp_cia_ops = _materialize
    graph_module._exec_with_source = _execute


class Stack:
    """torch's CapturedTraceback, as far as a tracer of fx reads it."""

    @staticmethod
    def extract() -> StackSummary:
        """The frames of who calls, the outermost first."""
        frame, found = sys._getframe(1), []
        while frame is not None:
            found.append(_summary(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return _Frames(reversed(found))


class _Frames(StackSummary):
    def summary(self) -> StackSummary:
        return self


@cache
def _summary(filename: str, line: int, name: str) -> FrameSummary:
    return FrameSummary(filename, line, name)


def _materialize() -> None:
    """Ops that were looked for are known to torch from then on."""
    now = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
    if now != _registered:
        _MATERIALIZE()
        _registered[:] = now


def _execute(src: str, globals: dict[str, Any], co_fields: dict[str, Any] | None = None) -> None:
    known = (src, *sorted((co_fields or {}).items()))
    if known not in _known:
        filename = graph_module._loader.cache(src, globals, co_fields)
        _known[known] = compile(src, filename, "exec", dont_inherit=True)
    exec(_known[known], globals)

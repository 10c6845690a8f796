"""The text of generated kernels: header, helper functions, signature, lines."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from ...ir.dtypes import DType
from .generate_ops import TRITON_NAMES, held
from .source import HEADER, jit_text

_HELPER = re.compile(r"(?<![\w.])_[a-z]\w*")


def function_text(
    name: str,
    about: str,
    arguments: Sequence[str],
    lines: Iterable[str],
    constants: Sequence[str] = ("ROWS", "COLUMNS"),
) -> str:
    """A kernel as a text of its own: ``HEADER``, the helpers that its lines call, and the function.

    Args:
        name: of the function.
        about: what it computes, for the comment above it.
        arguments: names of its run-time parameters.
        lines: its body, not indented.
        constants: names of its constexpr parameters.
    """
    return (
        HEADER
        + helper_text(lines := list(lines))
        + kernel_text(name, about, arguments, lines, constants)
    )


def kernel_text(
    name: str,
    about: str,
    arguments: Sequence[str],
    lines: Iterable[str],
    constants: Sequence[str] = ("ROWS", "COLUMNS"),
) -> str:
    """The function alone; arguments as for ``function_text``."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in about.splitlines())
    parameters = [*arguments, *(f"{constant}: tl.constexpr" for constant in constants)]
    signature = f"def {name}(\n" + "".join(f"    {p},\n" for p in parameters) + "):\n"
    body = "".join(f"    {line}\n" for line in lines)
    return f"\n\n{comment}@triton.jit\n{signature}{body}"


def load_text(pointer: str, element: str, mask: str, dtype: DType) -> str:
    """A load of the elements ``element`` (an index, "" for the first one), as values are held."""
    address = f"{pointer} + {element}" if element else pointer
    masked = f", mask={mask}, other=0" if mask else ""
    convert = "" if held(dtype) == TRITON_NAMES[dtype] else f".to({held(dtype)})"
    return f"tl.load({address}{masked}){convert}"


def helper_text(lines: Iterable[str]) -> str:
    """The text of the functions (functions.py) that lines call, and of those that these call."""
    calls = _calls()
    wanted: set[str] = set()
    pending = [name for line in lines for name in _HELPER.findall(line)]
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.add(name)
            pending.extend(calls[name])
    return _text_of(frozenset(wanted))


@cache
def _text_of(names: frozenset[str]) -> str:
    from . import functions  # imports triton, which a process that generates nothing can lack

    return jit_text(functions, names)


@cache
def _calls() -> Mapping[str, frozenset[str]]:
    """The helpers that each helper calls."""
    from . import functions

    defined = [
        node
        for node in ast.parse(inspect.getsource(functions)).body
        if isinstance(node, ast.FunctionDef)
    ]
    names = {node.name for node in defined}
    return {
        node.name: frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name)) & names
        for node in defined
    }

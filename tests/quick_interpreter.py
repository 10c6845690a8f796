"""Triton's interpreter has numpy compute a kernel's numbers, but takes most of its time for the
types of what it computes: a shape is a dozen objects, made anew for every operation. Here they are
made once for a shape; what is checked, and what is computed, stays. And it looks for the source of
a function by Python's own tokenizer, twice; here a file is parsed once for all of its functions.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import triton.language as tl
from triton._utils import validate_block_shape
from triton.runtime import interpreter

from tilewright.codegen.triton.compat import repair_interpreter

core = tl.core
_UNWRAPPED = core._unwrap_if_constexpr
_REWRITE = interpreter.FunctionRewriter.rewrite_ast


def hasten_interpreter() -> None:
    """Once and for the whole process."""
    if core.tensor.__init__ is _tensor:
        return
    repair_interpreter()
    core.block_type.__init__ = _block_type
    # Read in messages only.
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tensor.__init__ = _tensor
    core._unwrap_if_constexpr = _unwrapped
    interpreter._get_np_dtype = _numpy_of(interpreter._get_np_dtype)
    interpreter.FunctionRewriter.rewrite_ast = _rewritten


@cache
def _facts(shape: tuple[int, ...]) -> tuple[tl.tuple, int, tl.tuple, tl.constexpr]:
    """A shape and its count as a type has them, and as a tensor has them."""
    count = validate_block_shape(shape)
    constants = core.tuple([core.constexpr(size) for size in shape])
    return core.tuple(shape), count, constants, core.constexpr(count)


def _block_type(self: tl.block_type, element_ty: tl.dtype, shape: Sequence[object]) -> None:
    sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.facts = _facts(sizes)
    self.shape, self.numel = self.facts[:2]


def _tensor(self: tl.tensor, handle: object, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    facts = type.facts if type.is_block() else _facts(())
    self.shape, self.numel = facts[2:]


def _unwrapped(value: object) -> object:
    kind = type(value)
    if kind is int or kind is core.tensor or kind is bool:
        return value
    return value.value if kind is core.constexpr else _UNWRAPPED(value)


def _numpy_of(found: Callable[[tl.dtype], np.dtype]) -> Callable[[tl.dtype], np.dtype]:
    """numpy's type of each of Triton's: Triton makes a table of all for each question."""
    known: dict[str, np.dtype] = {}

    def of(type_: tl.dtype) -> np.dtype:
        scalar = type_.scalar
        if scalar.is_ptr():
            return found(type_)
        if scalar.name not in known:
            known[scalar.name] = found(scalar)
        return known[scalar.name]

    return of


def _rewritten(self: interpreter.FunctionRewriter) -> Callable[..., object]:
    """The function with what it assigns made the interpreter's, at the lines of its file."""
    code = self.fn.__code__
    defined = _definitions(code.co_filename).get(code.co_firstlineno)
    if defined is None:
        return _REWRITE(self)
    line, text = defined
    self.filename = code.co_filename
    tree = self.ast_transformer.visit(ast.parse(text))
    ast.increment_lineno(ast.fix_missing_locations(tree), line - 1)
    return self._compile_and_exec(tree)


@cache
def _definitions(filename: str) -> dict[int, tuple[int, str]]:
    """The functions of a file by where they start, decorators included: line and text of each."""
    try:
        text = Path(filename).read_text("utf-8")
    except OSError:  # there is no file
        return {}
    lines = text.splitlines(keepends=True)
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return {
        min(part.lineno for part in (node, *node.decorator_list)): (
            node.lineno,
            textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])),
        )
        for node in found
    }

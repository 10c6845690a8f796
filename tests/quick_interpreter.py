"""Triton's interpreter has numpy compute a kernel's numbers, but takes most of its time for the
types of what it computes: a shape is a dozen objects, made anew for every operation. Here they are
made once for a shape, and operands of one type and shape are taken as they are; what is checked,
and what is computed, stays. And it looks for the source of a function by Python's own tokenizer,
twice, and compiles it for each module that has it; here a file is parsed once for all of its
functions, and equal text is compiled once.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import CodeType

import numpy as np
import triton.language as tl
from triton._utils import validate_block_shape
from triton.language import semantic
from triton.runtime import interpreter

from tilewright.codegen.triton.compat import repair_interpreter

core = tl.core
_UNWRAPPED = core._unwrap_if_constexpr
_REWRITE = interpreter.FunctionRewriter.rewrite_ast
_CHECK = semantic.TritonSemantic.binary_op_type_checking_impl
_BROADCAST = semantic.TritonSemantic.broadcast_impl_value


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
    interpreter._patch_attr = _patch_attr
    semantic.TritonSemantic.binary_op_type_checking_impl = _checked
    semantic.TritonSemantic.broadcast_impl_value = _broadcast


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


def _patch_attr(obj: object, name: str, member: Callable, builder: object, scope: object) -> None:
    def given(*args: object, **kwargs: object) -> object:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return member(*args, **kwargs)

    scope.set_attr(obj, name, given)


def _checked(
    self: semantic.TritonSemantic,
    lhs: object,
    rhs: object,
    allow_lhs_ptr: bool = False,
    allow_rhs_ptr: bool = False,
    arithmetic_check: bool = True,
    div_or_mod: bool = False,
) -> tuple[tl.tensor, tl.tensor]:
    """Two of one type are computed in that type, but for quotients."""
    if lhs.__class__ is core.tensor is rhs.__class__ and not div_or_mod:
        scalar = lhs.type.scalar
        if scalar is rhs.type.scalar and not scalar.is_ptr():
            return self.broadcast_impl_value(lhs, rhs)
    options = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
    return _CHECK(self, lhs, rhs, *options)


def _broadcast(
    self: semantic.TritonSemantic, lhs: tl.tensor, rhs: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    left, right = lhs.type, rhs.type
    if left.is_block() and right.is_block() and left.facts is right.facts:
        return lhs, rhs
    return _BROADCAST(self, lhs, rhs)


def _rewritten(self: interpreter.FunctionRewriter) -> Callable[..., object]:
    """The function with what it assigns made the interpreter's, at the lines of its file."""
    code = self.fn.__code__
    defined = _definitions(code.co_filename).get(code.co_firstlineno)
    if defined is None:
        return _REWRITE(self)
    for name, value in vars(interpreter).items():
        self.fn.__globals__.setdefault(name, value)
    made = dict(self.kwargs)
    exec(_compiled(defined, code.co_filename, code.co_firstlineno), self.fn.__globals__, made)
    return made[self.fn.__name__]


def _compiled(text: str, filename: str, line: int) -> CodeType:
    """Where it was met first: errors name that place."""
    if text not in _KNOWN:
        tree = interpreter.FunctionRewriter.ast_transformer.visit(ast.parse(text))
        ast.increment_lineno(ast.fix_missing_locations(tree), line - 1)
        _KNOWN[text] = compile(tree, filename, "exec")
    return _KNOWN[text]


_KNOWN: dict[str, CodeType] = {}


@cache
def _definitions(filename: str) -> dict[int, str]:
    """The text of each function of a file, but for those in others, by the line of its first
    decorator; blank lines stand for decorators.
    """
    try:
        text = Path(filename).read_text("utf-8")
    except OSError:  # there is no file
        return {}
    lines = text.splitlines(keepends=True)
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    starts = [min(part.lineno for part in (node, *node.decorator_list)) for node in found]
    return {
        start: "\n" * (node.lineno - start) + "".join(lines[node.lineno - 1 : node.end_lineno])
        for start, node in zip(starts, found, strict=True)
    }

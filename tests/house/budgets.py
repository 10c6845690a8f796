"""The budgets of the style page, measured on the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from house.tree import Source

MAX_FILE_LINES = 500
MAX_MEDIAN_FILE_LINES = 150
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 200
USUAL_FUNCTION_LINES = 40
USUAL_SHARE = 0.9
KERNELS = "codegen/triton/kernels/"
# Bases that define no method for a subclass to fill in.
CONTRACTLESS = frozenset({"Protocol", "Generic", "Enum", "Exception", "NamedTuple", "object"})

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Function:
    """A function's place, its length from `def` to its last line, and whether it is a kernel."""

    where: str
    lines: int
    kernel: bool


def functions(source: Source) -> Iterator[Function]:
    """Every function and method of a module, nested ones too."""
    for node in source.nodes:
        if isinstance(node, FunctionNode):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            kernel = source.path.startswith(KERNELS) or _is_compiled(node)
            yield Function(f"{source.path}:{node.lineno} {node.name}", lines, kernel)


def _is_compiled(node: FunctionNode) -> bool:
    """Whether Triton or Gluon compiles it."""
    return any(ast.unparse(one) in ("triton.jit", "gluon.jit") for one in node.decorator_list)


def too_long(source: Source) -> list[str]:
    """The file and those of its functions that are over their hard limits."""
    lines = len(source.text.splitlines())
    found = [f"{source.path}: {lines} lines"] if lines > MAX_FILE_LINES else []
    for function in functions(source):
        limit = MAX_KERNEL_LINES if function.kernel else MAX_FUNCTION_LINES
        if function.lines > limit:
            found.append(f"{function.where}: {function.lines} lines, the limit is {limit}")
    return found


def undocumented(source: Source) -> list[str]:
    """Public functions, methods and classes without a docstring or without annotations."""
    if any(part.startswith("_") for part in source.path.removesuffix("__init__.py").split("/")):
        return []
    return list(_undocumented(source.path, source.tree.body, None, _contracts(source)))


def _undocumented(
    path: str, body: list[ast.stmt], within: ast.ClassDef | None, contracts: frozenset[str]
) -> Iterator[str]:
    for node in body:
        if not isinstance(node, FunctionNode | ast.ClassDef) or node.name.startswith("_"):
            continue
        where = f"{path}:{node.lineno} {node.name}"
        inherited = within is not None and (node.name in contracts or _may_override(within))
        if not inherited and ast.get_docstring(node) is None:
            yield f"{where}: no docstring"
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(path, node.body, node, contracts)
        elif missing := _unannotated(node, in_class=within is not None):
            yield f"{where}: no annotation of {', '.join(missing)}"


def _contracts(source: Source) -> frozenset[str]:
    """Methods that some class of the module documents: others of that name follow it."""
    methods = (
        node
        for owner in source.nodes
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, FunctionNode) and ast.get_docstring(node) is not None
    )
    return frozenset(node.name for node in methods)


def _may_override(within: ast.ClassDef) -> bool:
    """Whether a method of the class may have its contract in a base class of another module."""
    names = {ast.unparse(base).split("[")[0].split(".")[-1] for base in within.bases}
    return bool(names - CONTRACTLESS)


def _unannotated(node: FunctionNode, *, in_class: bool) -> list[str]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if in_class and not static:
        named = named[1:]
    rest = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    every = [*named, *arguments.kwonlyargs, *rest]
    missing = [argument.arg for argument in every if argument.annotation is None]
    return missing + (["the result"] if node.returns is None else [])

"""A hash of source that only changes where the code does."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator

from ..errors import UsageError

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def normalised_ast_hash(text: str) -> str:
    """SHA-256, in hex, of the syntax tree of Python source.

    Comments, docstrings, layout and line numbers do not enter. The tree is written out here and
    not by `ast.dump`, whose text differs between Python versions for one and the same source:
    fields that are empty are left out, so that those that newer versions add change nothing.

    Raises:
        UsageError: the source does not parse.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            "template source",
            expected="Python",
            found=str(error),
            remedy="Correct the template.",
        ) from error
    return hashlib.sha256("".join(_written(tree)).encode()).hexdigest()


def _written(node: object) -> Iterator[str]:
    if isinstance(node, ast.Constant):
        yield f"Constant({node.value!r})"
    elif isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, _DOCUMENTED):
                value = _without_docstring(value)
            if value is not None and value != []:
                yield f"{name}="
                yield from _written(value)
                yield ","
        yield ")"
    elif isinstance(node, list):
        yield "["
        for part in node:
            yield from _written(part)
            yield ","
        yield "]"
    else:
        yield repr(node)


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return body[1:] if isinstance(first.value.value, str) else body
    return body

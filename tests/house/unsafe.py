"""Ways to run code out of data, found on the syntax tree: none has a place in the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from house.tree import Source

MODULES = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"})
BUILTINS = frozenset({"eval", "exec", "compile"})
# torch's own container is a pickle, in both directions.
TORCH = frozenset({"load", "save"})


def unsafe(source: Source) -> list[str]:
    """Each unsafe import or call of a module, one line each."""
    found = _unsafe(source.nodes, _bound(source.nodes))
    return [f"{source.path}:{line}: {what}" for line, what in found]


def _unsafe(nodes: Sequence[ast.AST], bound: frozenset[str]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in MODULES or name in {f"torch.{n}" for n in TORCH}:
                yield node.lineno, name
                break
        if isinstance(node, ast.Call) and (what := _unsafe_call(node, bound)):
            yield node.lineno, what


def _unsafe_call(node: ast.Call, bound: frozenset[str]) -> str | None:
    function = node.func
    if any(k.arg == "allow_pickle" and not _is_false(k.value) for k in node.keywords):
        return "allow_pickle"
    if isinstance(function, ast.Name) and function.id in BUILTINS - bound:
        return function.id
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        owner, name = function.value.id, function.attr
        if (owner == "torch" and name in TORCH) or (owner == "builtins" and name in BUILTINS):
            return f"{owner}.{name}"
    return None


def _bound(nodes: Sequence[ast.AST]) -> frozenset[str]:
    """Names of the builtins that the module gives a meaning of its own: our `compile`."""
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    imported = {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return frozenset((defined | imported) & {"compile"})


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False

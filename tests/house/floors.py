"""The floors of the house: which folder may import which, checked on the syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from house.tree import Source

MAY_IMPORT: dict[str, frozenset[str]] = {
    "targets": frozenset(),
    "formats": frozenset({"targets"}),
    "ir": frozenset({"targets"}),
    "passes": frozenset({"ir", "formats", "targets"}),
    "autotune": frozenset({"targets"}),
    "codegen": frozenset({"ir", "targets", "autotune"}),
    "runtime": frozenset({"codegen", "autotune", "ir", "formats", "targets"}),
    "serving": frozenset({"runtime"}),
}
FOLDERS = frozenset(MAY_IMPORT) | {"compiler"}
DYNAMIC = frozenset({"import_module", "__import__"})
MODULE_STRING = re.compile(r"(\.+|tilewright\.)\w+(\.\w+)*(:\w+)?")


def violations(source: Source, facade: dict[str, str] | None = None) -> list[str]:
    """What a module imports that its floor forbids, one line each.

    Args:
        source: the module.
        facade: the root's lazy names and the modules behind them; a name taken through the root
            counts as an import of the module behind it.
    """
    here = source.package[1] if len(source.package) > 1 else None
    if here is None or here == "compiler":
        return []
    if here not in MAY_IMPORT:
        return [f"{source.path}: {here}/ stands on no floor"]
    allowed = MAY_IMPORT[here] | {here}
    return [
        f"{source.path}:{line}: {here}/ may not import {there}/ ({'.'.join(module)})"
        for line, module in _imports(source, facade or {})
        if (there := _folder(module)) is not None and there not in allowed
    ]


def absolute_imports(source: Source) -> list[str]:
    """Imports of ours by the absolute name: a clone under another name would miss them."""
    return [
        f"{source.path}:{node.lineno}: import it relatively"
        for node in source.nodes
        if (isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and not node.level and _is_ours(node.module or ""))
    ]


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == "tilewright"


def _folder(module: list[str]) -> str | None:
    inside = module[0] == "tilewright" and len(module) > 1
    return module[1] if inside and module[1] in FOLDERS else None


def _imports(source: Source, facade: dict[str, str]) -> Iterator[tuple[int, list[str]]]:
    """Line and dotted name of everything of ours that the module imports, strings included."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), source.package)
            for alias in node.names:
                behind = facade.get(alias.name) if base == ["tilewright"] else None
                yield node.lineno, base + (behind or alias.name).strip(".").split(".")
    if any(_is_dynamic(node) for node in source.nodes):
        yield from _strings(source)


def _strings(source: Source) -> Iterator[tuple[int, list[str]]]:
    for node in source.nodes:
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        # The constant head of an f-string ends in a dot: f".passes.{name}".
        text = node.value.rstrip(".") or node.value
        if MODULE_STRING.fullmatch(text):
            yield node.lineno, _absolute(text.split(":")[0], source.package)


def _is_dynamic(node: ast.AST) -> bool:
    names = (getattr(node, field, None) for field in ("id", "attr", "name"))
    return any(name in DYNAMIC for name in names)


def _absolute(module: str, package: list[str]) -> list[str]:
    stem = module.lstrip(".")
    level = len(module) - len(stem)
    base = package[: len(package) - level + 1] if level else []
    return base + (stem.split(".") if stem else [])

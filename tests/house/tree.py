"""Where our source files are, and the two ways to look at one."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_PACKAGES = frozenset({"tests", "examples", "benchmarks", "build", "dist", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Source:
    """A module of ours: its path relative to the root, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        """Not to be changed: it is parsed once for all tests."""
        tree = self.nodes[0]
        assert isinstance(tree, ast.Module)
        return tree

    @property
    def nodes(self) -> tuple[ast.AST, ...]:
        """The tree, and all that is in it."""
        return nodes_of(self)

    @property
    def package(self) -> list[str]:
        """The dotted name of the package the module is in, as parts."""
        return ["tilewright", *self.path.split("/")[:-1]]


@cache
def nodes_of(source: Source) -> tuple[ast.AST, ...]:
    """A source's tree, and all that is in it."""
    return tuple(ast.walk(ast.parse(source.text, source.path)))


def package_folders() -> Iterator[Path]:
    """Each folder that belongs to the package, the root first, with an __init__.py or without."""
    for name, folders, _ in os.walk(ROOT):
        folders[:] = sorted(f for f in folders if f not in NOT_PACKAGES and _visible(f))
        yield Path(name)


def _visible(folder: str) -> bool:
    return not folder.startswith(".") and not folder.endswith(".egg-info")


@cache
def sources() -> tuple[Source, ...]:
    """Every module of the package."""
    paths = (path for folder in package_folders() for path in sorted(folder.glob("*.py")))
    return tuple(Source(p.relative_to(ROOT).as_posix(), p.read_text("utf-8")) for p in paths)

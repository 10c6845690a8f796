"""A checkout of this project as something to run: its own code in its own process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError
from ...formats.hashing import sha256_files
from ...settings import current

PACKAGE = "tilewright"
_OURS = Path(__file__).resolve().parents[2]
_NOT_OF_THE_PACKAGE = frozenset({"tests", "benchmarks", "examples"})


@dataclass(frozen=True, slots=True)
class Checkout:
    """A folder that holds the package, whatever the folder is called.

    Attributes:
        root: the folder, absolute.
    """

    root: Path

    @staticmethod
    def running() -> Checkout:
        """The code that runs now."""
        return Checkout(_OURS)

    @staticmethod
    def at(path: str | Path) -> Checkout:
        """The checkout at a path; UsageError where there is none."""
        root = Path(path).resolve()
        missing = [n for n in ("__init__.py", "compiler/regress") if not (root / n).exists()]
        if missing:
            raise UsageError(
                f"checkout {path}",
                expected="a working tree of this project, with tilewright regress in it",
                found="nothing there" if not root.exists() else f"no {' and no '.join(missing)}",
                remedy="Make one: git worktree add PATH COMMIT.",
            )
        return Checkout(root)

    @property
    def commit(self) -> str | None:
        """The hash of the commit that is checked out, None outside of git."""
        if git(self.root, "rev-parse", "--show-toplevel") != str(self.root):
            return None  # a plain copy; what lies around it is another repository
        return git(self.root, "rev-parse", "HEAD")

    @property
    def is_dirty(self) -> bool:
        """Whether the package's code differs from the commit that is checked out."""
        return self.commit is not None and bool(
            git(self.root, "status", "--porcelain", "--", "*.py")
        )

    @property
    def digest(self) -> str:
        """A hash of the package's own files: what is not committed counts too."""
        files = sorted(_files(self.root))
        hashes = sha256_files(files)
        listed = [[str(path.relative_to(self.root)), hashes[path]] for path in files]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def environment(self) -> dict[str, str]:
        """The environment of a process in which `import tilewright` means this checkout."""
        others = [Path(path).absolute() for path in sys.path if path]
        path = [self._importable(), *(path for path in others if path.resolve() != _OURS)]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "PYTHONSAFEPATH": "1",  # nor may the folder it is started in stand for modules
        }

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line that runs a module of the package."""
        return [sys.executable, "-m", f"{PACKAGE}.{module}", *arguments]

    def _importable(self) -> Path:
        """A folder that holds nothing but the checkout, under the package's name."""
        name = hashlib.sha256(str(self.root).encode()).hexdigest()[:16]
        folder = current().cache / "checkouts" / name
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / PACKAGE
        if not link.is_symlink() or link.resolve() != self.root:
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                (Path(beside) / PACKAGE).symlink_to(self.root)
                os.replace(Path(beside) / PACKAGE, link)
        return folder


def git(root: Path, *arguments: str) -> str | None:
    """What a git command prints, stripped; None where it fails or there is no git."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _files(root: Path) -> Iterator[Path]:
    """What the package consists of: tables and pages as well as code."""
    yield from root.glob("*.py")
    for init in root.glob("*/__init__.py"):
        folder = init.parent
        for path in folder.rglob("*") if folder.name not in _NOT_OF_THE_PACKAGE else ():
            hidden = any(p.startswith((".", "__pycache__")) for p in path.relative_to(folder).parts)
            if not hidden and path.is_file():
                yield path


def run_in(
    checkout: Checkout,
    module: str,
    arguments: Sequence[str],
    extra: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a module of a checkout to its end; the caller looks at the exit code."""
    return subprocess.run(
        checkout.command(module, *arguments),
        capture_output=True,
        text=True,
        check=False,
        env={**checkout.environment(), **(extra or {})},
        cwd=tempfile.gettempdir(),
    )

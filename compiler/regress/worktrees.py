"""Commits of a repository, and checkouts of them that are gone afterwards.

The user's working tree and index are never touched: each commit has a worktree of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import EngineError, UsageError
from .checkout import PACKAGE, Checkout

SHOWN = 12
"""Digits of a commit's hash that are shown."""

# Set where a git hook runs us: they would have every command work on the user's own index.
_OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
_NO_HOOKS = ("-c", f"core.hooksPath={os.devnull}")
_FULL_CLONE = "Get the whole history first: git fetch --unshallow."


class Repository:
    """A git repository of this project.

    Args:
        root: a folder in it.

    Raises:
        UsageError: it is no repository, or there is no git.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        done = self._git("rev-parse", "--git-dir")
        if done.returncode != 0:
            raise UsageError(
                f"folder {root}",
                expected="a git repository, to find commits in",
                found=_said(done),
                remedy="Run it in a clone of the project.",
            )

    def resolve(self, revision: str) -> str:
        """The full hash of a commit; UsageError where there is no such commit."""
        found = self._git(
            "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"
        )
        if found.returncode != 0 or not found.stdout.strip():
            raise UsageError(
                f"revision {revision!r}",
                expected=f"a commit of {self.root}",
                found="none of that name" + (", in a shallow clone" if self.is_shallow else ""),
                remedy=_FULL_CLONE if self.is_shallow else "See git log.",
            )
        return found.stdout.strip()

    @property
    def is_shallow(self) -> bool:
        """Whether the history was cut off when the repository was cloned."""
        return self._out("rev-parse", "--is-shallow-repository") == "true"

    def between(self, good: str, bad: str) -> tuple[str, ...]:
        """Hashes from the commit after ``good`` to ``bad``, along first parents: a merge is one.

        Raises:
            UsageError: ``good`` is not on that line, or is ``bad`` itself.
        """
        first, last = self.resolve(good), self.resolve(bad)
        if first == last:
            raise UsageError(
                f"revisions {good!r} and {bad!r}",
                expected="a good commit, and a later one that is bad",
                found=f"{first[:SHOWN]} twice",
                remedy="Name an older commit as good.",
            )
        if self._git("merge-base", "--is-ancestor", first, last).returncode != 0:
            shallow = ", in a shallow clone" if self.is_shallow else ""
            raise UsageError(
                f"revision {good!r}",
                expected=f"an ancestor of {bad!r}",
                found=f"{first[:SHOWN]}, which is none{shallow}",
                remedy=_FULL_CLONE if shallow else "Name one of: git log --first-parent.",
            )
        listed = self._out("rev-list", "--first-parent", "--reverse", f"{first}..{last}")
        commits = tuple(listed.split())
        self._check_line(good, first, commits[0])
        return commits

    def _check_line(self, good: str, first: str, following: str) -> None:
        """What is good must be what the first step started from, or its blame means nothing."""
        parent = self._out("rev-parse", f"{following}^1")
        if parent != first:
            raise UsageError(
                f"revision {good!r}",
                expected="a commit on the line of first parents that leads to the bad one",
                found=f"{first[:SHOWN]}, which was merged into it from a branch",
                remedy=f"Name {parent[:SHOWN]} as good: the branch left the line there.",
            )

    def about(self, commit: str) -> tuple[str, str, str]:
        """Subject, author and date (ISO 8601) of a commit."""
        shown = self._out("show", "-s", "--format=%s%x00%an%x00%aI", commit)
        subject, author, date = shown.split("\0")
        return subject, author, date

    @contextmanager
    def checkout(self, commit: str) -> Iterator[Checkout]:
        """A checkout of a commit in a temporary worktree, which goes with the block.

        Raises:
            EngineError: the commit has no code that regress could run.
        """
        with tempfile.TemporaryDirectory(prefix="tilewright-bisect-") as folder:
            path = Path(folder) / commit[:SHOWN]
            try:
                self._out(*_NO_HOOKS, "worktree", "add", "--detach", "--quiet", str(path), commit)
                checkout = _checkout(path, commit)
                try:
                    yield checkout
                finally:
                    _forget(checkout)
            finally:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # Removing it by name forgets it too. Pruning, which would also forget worktrees of the
        # user's on a disk that is away, is for where that fails.
        removed = self._git("worktree", "remove", "--force", "--force", str(path))
        shutil.rmtree(path, ignore_errors=True)
        if removed.returncode != 0:
            self._git("worktree", "prune")

    def _out(self, *arguments: str) -> str:
        done = self._git(*arguments)
        if done.returncode != 0:
            raise UsageError(
                f"repository {self.root}",
                expected=f"git {' '.join(arguments)} to succeed",
                found=_said(done),
                remedy="Put right what git complains of.",
            )
        return done.stdout.strip()

    def _git(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in _OF_A_HOOK}
        command = ["git", "-C", str(self.root), *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment
            )
        except OSError as error:
            return subprocess.CompletedProcess(command, 127, "", f"git does not run: {error}")


def _checkout(path: Path, commit: str) -> Checkout:
    try:
        return Checkout.at(path)
    except UsageError as error:
        raise EngineError(
            f"commit {commit[:SHOWN]}",
            expected=error.expected,
            found=error.found,
            remedy="Choose commits since tilewright regress exists.",
        ) from error


def _forget(checkout: Checkout) -> None:
    """Removes the link in the cache by which processes imported the checkout."""
    link = Path(checkout.environment()["PYTHONPATH"].split(os.pathsep)[0]) / PACKAGE
    if link.is_symlink() and link.resolve() == checkout.root:
        link.unlink()
        with suppress(OSError):
            link.parent.rmdir()


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"

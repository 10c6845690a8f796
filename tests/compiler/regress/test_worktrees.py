"""Whatever a bisection does, the user's repository stays as it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bisect_repositories import (
    assert_clean,
    bisected,
    git,
    plain_git,
    recorder,
    repository,
    suite,
)
from tilewright.compiler.regress.worktrees import Repository
from tilewright.errors import UsageError

__all__ = ["plain_git", "suite"]  # fixtures


def test_a_shallow_clone_is_said_to_be_one(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5, 5, 7)
    git(tmp_path, "clone", "-q", "--depth", "2", folder.as_uri(), "shallow")
    shallow = tmp_path / "shallow"
    with pytest.raises(UsageError, match="shallow clone.*--unshallow"):
        bisected(shallow, suite, commits[0], "main")
    assert bisected(shallow, suite, commits[1], "main").commit == commits[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_worktrees_go_whatever_happens(tmp_path, suite, error):
    folder, commits = repository(tmp_path / "repo", 5, 5, 7)
    seen = []

    def broken(checkout, suite):
        seen.append(checkout.root)
        if len(seen) == 2:
            raise error
        return recorder(checkout, suite)

    with pytest.raises(error):
        bisected(folder, suite, commits[0], "main", recorder=broken)
    assert len(seen) == 2 and not any(path.exists() for path in seen)
    assert_clean(folder)


def test_a_worktree_of_the_users_that_is_away_is_kept(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5, 7)
    git(folder, "worktree", "add", "-q", str(tmp_path / "disk"), "-b", "other")
    shutil.move(tmp_path / "disk", tmp_path / "unplugged")
    bisected(folder, suite, commits[0], "main")
    shutil.move(tmp_path / "unplugged", tmp_path / "disk")
    assert git(tmp_path / "disk", "status", "--porcelain") == ""


def test_run_by_a_hook_it_works_in_its_own_worktrees(tmp_path, suite, monkeypatch):
    """Git gives hooks the user's index in the environment; and hooks of the user's do not run."""
    folder, commits = repository(tmp_path / "repo", 5, 7)
    hook = folder / ".git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    index = (folder / ".git/index").read_bytes()
    monkeypatch.setenv("GIT_INDEX_FILE", str(folder / ".git/index"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert bisected(folder, suite, commits[0], "main").commit == commits[1]
    assert (folder / ".git/index").read_bytes() == index
    assert not (tmp_path / "ran").exists()


def test_nothing_is_left_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    folder, commits = repository(tmp_path / "repo", 5)
    with Repository(folder).checkout(commits[0]) as checkout:
        assert checkout.commit == commits[0]
        link = Path(checkout.environment()["PYTHONPATH"].split(os.pathsep)[0]) / "tilewright"
        assert link.resolve() == checkout.root
    assert not link.is_symlink()
    assert not list((tmp_path / "cache" / "checkouts").iterdir())


def test_without_git_it_says_so(tmp_path, suite, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="git does not run"):
        bisected(tmp_path, suite, "a", "b")

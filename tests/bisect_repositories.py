"""Throw-away repositories whose commits have made-up figures in place of code."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from regress_suites import GRAPH, HEAD, kernel, snapshot, suite_of
from tilewright.compiler.regress.bisect import bisect_series
from tilewright.errors import EngineError

LAUNCHES = "norm.h100/call/launches"


@pytest.fixture
def suite(tmp_path):
    """With the one case that `recorder` records."""
    return suite_of(tmp_path, HEAD + GRAPH)


@pytest.fixture(autouse=True)
def plain_git(monkeypatch):
    """Neither the user's settings nor the clock decide what a test repository holds."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "Ada")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "ada@example.org")
        monkeypatch.setenv(f"GIT_{who}_DATE", "2026-01-02T03:04:05+00:00")


def git(folder, *arguments):
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def committed(folder, subject, value):
    """A commit at which the case has that value; None: it does not compile."""
    (folder / "value.json").write_text(json.dumps({"is": value, "at": subject}))
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", subject)
    return git(folder, "rev-parse", "HEAD")


def repository(folder, *values):
    """A repository with a commit for each value, and their hashes."""
    (folder / "compiler" / "regress").mkdir(parents=True)
    for name in ("__init__.py", "compiler/regress/__init__.py"):
        (folder / name).write_text("")
    git(folder, "init", "-q", "-b", "main")
    return folder, [committed(folder, f"number {i}", value) for i, value in enumerate(values)]


def value_at(checkout):
    return json.loads((checkout.root / "value.json").read_text())["is"]


def recorder(checkout, suite):
    """What `record_case` does, but for compiling: the value is read from the commit."""
    value = value_at(checkout)
    if value is None:
        raise EngineError("the code", expected="a", found="no compiler", remedy="b")
    kernels = (kernel("add_ab12", str(value % 10) * 64),)
    series = {"call": {"launches": value, "roofline": 1e-6}}
    return snapshot(suite.cases[0].definition, *kernels, series=series)


def bisected(folder, suite, good, bad, series=LAUNCHES, **more):
    return bisect_series(folder, suite, series, good, bad, **{"recorder": recorder, **more})


def assert_clean(folder):
    """No worktree but the user's own, nothing left of others."""
    assert len(git(folder, "worktree", "list").splitlines()) == 1
    assert not list((folder / ".git").glob("worktrees/*"))

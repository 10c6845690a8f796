"""Where within a commit a difference begins, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bisect_repositories import (
    bisected,
    plain_git,
    repository,
    suite,
)
from regress_suites import kernel, snapshot
from tilewright.compiler.regress.culprit import (
    culprit_data,
    explain,
    first_changed_pass,
    render_culprit,
)

__all__ = ["plain_git", "suite"]  # fixtures

OLD = (("captured", "0"), ("a", "0"), ("b", "1"), ("a", "1"), ("c", "2"))


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (OLD, None),
        # The same passes, one of which makes another graph; what follows from it is not blamed.
        ((*OLD[:2], ("b", "x"), ("a", "x"), ("c", "y")), ("b", 1, "makes another graph")),
        ((*OLD[:4], ("c", "x")), ("c", 3, "makes another graph")),
        # One that does nothing comes, goes, or has another name.
        ((*OLD[:3], ("new", "1"), *OLD[3:]), None),
        ((OLD[0], *OLD[2:]), None),
        ((*OLD[:4], ("d", "2")), None),
        # One that does something.
        (OLD[:4], ("c", 3, "is gone")),
        ((*OLD, ("d", "3")), ("d", 4, "is new")),
        ((*OLD[:4], ("d", "x"), ("c", "y")), ("d", 3, "is new")),
        ((*OLD[:2], OLD[3], ("c", "x")), ("b", 1, "is gone")),
        ((*OLD[:2], ("c", "x"), ("b", "y"), ("a", "y")), ("c", 1, "runs elsewhere now")),
        ((("captured", "x"), *OLD[1:]), (None, None, "captured graph")),
    ],
)
def test_the_pass_is_named(new, expected):
    found = first_changed_pass(OLD, new)
    if expected is None or found is None:
        assert found is expected
        return
    name, limit, note = expected
    assert found[:2] == (name, limit) and note in found[2]
    if limit is not None and not note.endswith("gone"):  # the limit counts passes, not graphs
        assert new[1 + limit][0] == name


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("01")), max_size=8))
def test_with_the_same_names_it_is_the_first_that_differs(passes):
    old = [("captured", "0"), *((name, "0") for name, _ in passes)]
    new = [("captured", "0"), *passes]
    differ = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    found = first_changed_pass(old, new)
    assert (found and found[:2]) == ((new[differ[0]][0], differ[0] - 1) if differ else None)


def test_the_stage_and_the_kernels_are_named(suite):
    definition = suite.cases[0].definition
    one, two = kernel("add_ab12"), kernel("mul_cd34", "2" * 64)
    old = snapshot(definition, one, two)

    def stage(new, timed=False):
        found = explain(suite, old, new, timed)
        return found.stage, found.kernels, tuple(diff.subject for diff in found.diffs)

    assert stage(old) == ("compiler", (), ())
    assert stage(old, timed=True) == ("runtime", (), ())
    other = kernel("mul_cd34", "3" * 64)
    assert stage(snapshot(definition, one, other)) == ("codegen", ("mul",), ("mul",))
    assert stage(snapshot(definition, one))[:2] == ("codegen", ("mul", "program"))
    three = kernel("sub_ef56", "4" * 64)
    assert stage(snapshot(definition, one, two, three))[1] == ("sub", "program")
    recompiled = replace(two, cubins={"": "f" * 64})
    assert stage(snapshot(definition, one, recompiled)) == ("machine code", ("mul",), ())
    reordered = replace(old, program=old.program + "{}\n")
    assert stage(reordered) == ("codegen", ("program",), ("program",))
    passes = (("captured", "a"), ("fuse", "c"))
    fused = snapshot(definition, one, other, passes=passes)
    assert stage(fused) == ("pass", ("mul",), ("mul",))
    captured = replace(old, passes=(("captured", "x"), ("fuse", "y")))
    assert stage(captured)[0] == "capture"


def test_culprits_are_json_and_text(tmp_path, suite):
    folder, commits = repository(tmp_path / "repo", 5, 7)
    found = bisected(folder, suite, commits[0], "main")
    data = json.loads(json.dumps(culprit_data(found)))
    assert data["commit"] == commits[1] and data["stage"] == "codegen"
    assert data["values"] == [
        {"commit": commits[0], "value": 5},
        {"commit": commits[1], "value": 7},
    ]
    assert data["kernels"] == ["add"] and data["diffs"][0]["subject"] == "add"
    text = render_culprit(replace(found, subject="nasty \x1b[31m\nsubject"))
    assert "\x1b" not in text and "commit: " + commits[1][:12] in text
    assert f"{commits[0][:12]} 5\n" in text and f"{commits[1][:12]} 7 ← the culprit" in text
    assert "code generation" in text and "add changed:" in text

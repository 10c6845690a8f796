"""Every error names its culprit, what was expected and found, and the remedy."""

from __future__ import annotations

import inspect

import pytest

from tilewright import errors

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.TilewrightError)
]


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_all_four(kind):
    error = kind("pass fuse", expected="f32", found="i64", remedy="Cast the input.")
    text = str(error)
    assert [
        part for part in ("pass fuse", "f32", "i64", "Cast the input.") if part not in text
    ] == []
    assert (error.culprit, error.expected) == ("pass fuse", "f32")
    assert (error.found, error.remedy) == ("i64", "Cast the input.")


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_a_finding_exits_with_one_and_misuse_with_two(kind):
    assert kind.exit_code == (1 if kind is errors.VerificationError else 2)


@pytest.mark.quick
def test_an_error_cannot_leave_a_part_out():
    with pytest.raises(TypeError):
        errors.UsageError("target", expected="cpu", found="gpu9000")

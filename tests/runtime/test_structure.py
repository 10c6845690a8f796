"""Nested arguments as plain data: there and back, and what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.errors import EngineError
from tilewright.runtime.structure import (
    Branch,
    Fixed,
    Leaf,
    flatten,
    from_json,
    rebuild,
    to_json,
)

CONSTANTS = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just(0.5)


@st.composite
def structures(draw):
    """A structure whose leaves are numbered in order, and how many there are."""
    count = 0

    def build(depth: int):
        nonlocal count
        kind = draw(
            st.sampled_from(["leaf", "fixed", "tuple", "list", "dict"][: 2 + 3 * (depth > 0)])
        )
        if kind == "leaf":
            count += 1
            return Leaf(count - 1)
        if kind == "fixed":
            return Fixed(draw(CONSTANTS))
        keys = draw(st.lists(st.text(max_size=3), max_size=3, unique=True))
        items = tuple(build(depth - 1) for _ in keys)
        return Branch(kind, tuple(keys) if kind == "dict" else (), items)

    return build(3), count


@pytest.mark.quick
@given(structures())
def test_what_is_rebuilt_is_flattened_again(drawn) -> None:
    structure, count = drawn
    tensors = [torch.tensor(i) for i in range(count)]
    found = flatten(structure, rebuild(structure, tensors))
    assert found.keys() == set(range(count))
    assert all(found[i] is tensors[i] for i in range(count))


@pytest.mark.quick
@given(structures())
def test_structures_go_through_json(drawn) -> None:
    structure, _ = drawn
    assert from_json(json.loads(json.dumps(to_json(structure)))) == structure


CALL = Branch(
    "tuple",
    (),
    (
        Branch("list", (), (Leaf(0), Fixed(3))),
        Branch("dict", ("mask", "size"), (Leaf(1), Fixed(None))),
    ),
)
X = torch.zeros(1)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (([X, 3], {"mask": X}), "names"),
        (([X, 3], {"mask": X, "size": None, "more": 1}), "names"),
        (([X, 3], [X, None]), "names"),
        (([X, 4], {"mask": X, "size": None}), r"\[0\]\[1\]: 3 as at compile time, not 4"),
        (([X], {"mask": X, "size": None}), "2 values, not 1"),
        (([3, 3], {"mask": X, "size": None}), r"\[0\]\[0\]: a tensor, not int"),
        ((X, {"mask": X, "size": None}), "2 values, not Tensor"),
        ("ab", "2 values"),
        (None, "2 values"),
    ],
)
def test_another_structure_is_refused_with_the_place(value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten(CALL, value)


@pytest.mark.quick
@pytest.mark.parametrize(
    "data",
    [None, 3, [], {}, {"leaf": "0"}, {"fixed": []}, {"kind": "set", "keys": [], "items": []},
     {"kind": "list", "items": [{"leaf": 0}]}, {"kind": "list", "keys": [], "items": [7]}],
)  # fmt: skip
def test_json_that_was_not_written_here_is_refused(data) -> None:
    with pytest.raises(EngineError, match="structure"):
        from_json(data)

"""Keys are complete and canonical; buckets and the hash of a template do what they say."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.autotune.ast_hash import normalised_ast_hash
from tilewright.autotune.key import Conditions, Key, bucket, reason_of, token_bucket
from tilewright.errors import UsageError
from tuning_records import CONDITIONS, KEY, conditions, keys, problem


@given(keys)
def test_keys_survive_json(key):
    again = Key.from_json(json.loads(json.dumps(key.to_json())))
    assert again == key
    assert again.digest == key.digest
    assert key.differences(again) == ()


@given(conditions, conditions)
def test_conditions_survive_json_and_differ_both_ways(one, other):
    assert Conditions.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert one.differences(other) == other.differences(one)
    assert one.differences(one) == ()


@given(keys, keys)
def test_keys_differ_where_their_digests_do(one, other):
    differs = one.differences(other)
    assert (differs == ()) == (one == other) == (one.digest == other.digest)
    assert set(differs) == set(other.differences(one))


@pytest.mark.quick
def test_each_field_has_a_reason_and_is_told_apart():
    changed = {
        "template": "gemm",
        "template_hash": "c" * 64,
        "space_hash": "c" * 64,
        "problem": problem(tokens=128),
        "device": "h200",
        "arch": 100,
    }
    assert set(changed) == {f.name for f in fields(Key)}
    for name, value in changed.items():
        other = replace(KEY, **{name: value})
        named = "problem.tokens" if name == "problem" else name
        assert KEY.differences(other) == (named,)
        assert other.digest != KEY.digest
        assert reason_of(named)
    for f in fields(Conditions):
        assert CONDITIONS.differences(replace(CONDITIONS, **{f.name: "other"})) == (f.name,)
        assert reason_of(f.name)


@pytest.mark.quick
def test_the_order_of_the_problem_does_not_matter():
    assert replace(KEY, problem=tuple(reversed(KEY.problem))) == KEY
    absent = replace(KEY, problem=KEY.problem[1:])
    assert KEY.differences(absent) == ("problem.dtype",)
    assert str(KEY) == "linear [dtype=bfloat16 k=4096 n=4096 tokens=64] on h100"


@pytest.mark.quick
def test_an_unknown_driver_differs_from_none():
    unknown = replace(CONDITIONS, driver=None)
    assert unknown.differences(CONDITIONS) == CONDITIONS.differences(unknown) == ()
    assert replace(unknown, triton="3.5").differences(CONDITIONS) == ("triton",)


@pytest.mark.quick
@pytest.mark.parametrize(
    "wrong",
    [(("n", 1), ("n", 2)), (("n", True),), (("n", 1.5),), (("n", -1),), (("n", None),)],
)
def test_a_problem_of_other_values_is_refused(wrong):
    with pytest.raises(UsageError, match="tuning key"):
        replace(KEY, problem=wrong)


@pytest.mark.quick
def test_reading_is_strict():
    data = KEY.to_json()
    broken = [None, [], {}, {**data, "more": 1}, {**data, "arch": "90"}, {**data, "arch": True}]
    broken += [{**data, "problem": []}, {k: v for k, v in data.items() if k != "device"}]
    for wrong in broken:
        with pytest.raises(UsageError, match="tuning key"):
            Key.from_json(wrong)
    for wrong in ({}, {**CONDITIONS.to_json(), "driver": 5}, {**CONDITIONS.to_json(), "x": ""}):
        with pytest.raises(UsageError, match="tuning conditions"):
            Conditions.from_json(wrong)


@given(st.integers(1, 10_000))
def test_a_token_bucket_is_the_next_power_of_two(n):
    found = token_bucket(n)
    assert found & (found - 1) == 0
    assert (n <= found < 2 * n) if n <= 8192 else found == 8192
    assert token_bucket(found) == found


@pytest.mark.quick
def test_buckets_of_other_sizes():
    assert [bucket(n, (1, 24, 64)) for n in (1, 2, 24, 25, 64, 65)] == [1, 24, 24, 64, 64, 64]
    for n in (0, -1):
        with pytest.raises(UsageError, match="1 or more"):
            token_bucket(n)


SOURCE = '''
@jit
def kernel(x, n: constexpr = 4, *, tail=None):
    """Adds."""
    for i in range(n):  # rows
        x[i, :] = {"a": 1, **{}}[f"{i}"] + 0x10
    return
'''


@pytest.mark.quick
def test_the_hash_is_of_the_code_alone():
    digest = normalised_ast_hash(SOURCE)
    same = [
        SOURCE.replace('    """Adds."""\n', ""),
        SOURCE.replace("  # rows", "").replace("0x10", "(16)"),
        '"""A module."""\n# and a comment\n' + SOURCE.replace("\n    ", "\n        "),
    ]
    assert {normalised_ast_hash(text) for text in same} == {digest}
    pairs = [
        ("constexpr = 4", "constexpr = 5"),
        ("constexpr = 4", "constexpr"),
        ("x[i, :]", "x[i, ::2]"),
        ("+ 0x10", "+ 16.0"),
        ("+ 0x10", "- 0x10"),
        ("tail=None", "tail"),
        ("**{}", '"b": {}'),
        ("return", "return 'Adds.'"),
        ("range(n)", "range(m)"),
    ]
    assert all(old in SOURCE for old, _ in pairs)
    others = {normalised_ast_hash(SOURCE.replace(old, new)) for old, new in pairs}
    assert len(others | {digest}) == len(pairs) + 1
    # Written down, so that a Python whose trees are written otherwise shows itself here.
    assert digest.startswith("a3c134817c88542c")
    with pytest.raises(UsageError, match="template source"):
        normalised_ast_hash("def")

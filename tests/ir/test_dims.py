"""Sizes: ring laws, division against Python's, text, substitution."""

from __future__ import annotations

import operator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tilewright.errors import GraphError
from tilewright.ir import dims
from tilewright.ir.dims import (
    Dim,
    call,
    divide,
    evaluate,
    name_of,
    parse_size,
    substitute,
    symbol,
)

NAMES = ("T", "S", "B")
ENVIRONMENTS = st.fixed_dictionaries({name: st.integers(1, 12) for name in NAMES})
BINARY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "min": min,
    "max": max,
}
CALLS = {"//": "floordiv", "%": "mod", "min": "min", "max": "max"}
T, S, B = map(symbol, NAMES)

# A number, a name, or (operator, left, right); built as a size, and computed plainly.
TREES = st.recursive(
    st.one_of(st.integers(-9, 9), st.sampled_from(NAMES)),
    lambda inner: st.tuples(st.sampled_from(sorted(BINARY)), inner, inner),
    max_leaves=7,
)


def build(tree):
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return symbol(tree)
    op, left, right = tree
    left, right = build(left), build(right)
    return call(CALLS[op], left, right) if op in CALLS else BINARY[op](left, right)


def compute(tree, values):
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return values[tree]
    op, left, right = tree
    return BINARY[op](compute(left, values), compute(right, values))


def _size(tree):
    try:
        return build(tree)
    except GraphError:
        assume(False)


def _computed(tree, values):
    try:
        return compute(tree, values)
    except ZeroDivisionError:
        assume(False)


def _evaluated(size, values):
    try:
        return evaluate(size, values)
    except GraphError:
        assume(False)


@pytest.mark.quick
@settings(max_examples=300)
@given(TREES, ENVIRONMENTS)
def test_a_size_has_the_value_of_its_expression(tree, values):
    expected = _computed(tree, values)
    assert evaluate(_size(tree), values) == expected


@settings(max_examples=200)
@given(TREES)
def test_text_reads_back_to_the_same_size(tree):
    size = _size(tree)
    assert parse_size(str(size)) == size
    assert str(parse_size(str(size))) == str(size)


@given(TREES)
def test_only_a_symbol_alone_is_a_name(tree):
    size = _size(tree)
    assert name_of(size) == (str(size) if str(size).isidentifier() else None)


@settings(max_examples=200)
@given(TREES, ENVIRONMENTS)
def test_substitution_and_evaluation_commute(tree, values):
    size = _size(tree)
    expected = _evaluated(size, values)
    assert substitute(size, values) == expected
    inner = substitute(size, {"T": T * 2 + 1, "S": S + B})
    outer = {**values, "T": values["T"] * 2 + 1, "S": values["S"] + values["B"]}
    assert _evaluated(inner, values) == _evaluated(size, outer)


@settings(max_examples=100)
@given(TREES, TREES, TREES)
def test_ring_laws(a, b, c):
    a, b, c = _size(a), _size(b), _size(c)
    assert a + b == b + a and a * b == b * a
    assert (a + b) + c == a + (b + c) and (a * b) * c == a * (b * c)
    assert a * (b + c) == a * b + a * c
    assert a - a == 0 and a + 0 == a and a * 1 == a and a * 0 == 0


@settings(max_examples=200)
@given(TREES, TREES)
def test_an_exact_quotient_multiplies_back(a, b):
    a, b = _size(a), _size(b)
    quotient = divide(a, b)
    assert quotient is None or quotient * b == a
    if b != 0 and isinstance(b, Dim) and len(b.terms) == 1:
        assert divide(a * b, b) == a


@settings(max_examples=200)
@given(TREES, ENVIRONMENTS)
def test_what_is_provably_nonnegative_is(tree, values):
    size = _size(tree)
    if dims.is_nonnegative(size):
        assert _evaluated(size, values) >= 0


@pytest.mark.quick
@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((5 * T + 7) // 4, "T + (T + 3) // 4 + 1"),
        ((2 * T + 1) // 4, "T // 2"),
        ((2 * T + 1) % 4, "2*(T % 2) + 1"),
        ((4 * T + 3) % 4, "3"),
        ((T - 1) // 2 + 1, "(T + 1) // 2"),
        ((6 * T + 6) // (T + 1), "6"),
        (T * (T // 2) // T, "T // 2"),
        (-6 * T // -3, "2*T"),
        (T - T, "0"),
        (2 * T + T - 3 * T + S, "S"),
        (call("min", T, 5), "min(5, T)"),
        (call("min", 5, T), "min(5, T)"),
        (call("max", T, T + 1), "T + 1"),
        (call("max", 0, T), "T"),
        ((T // 2) // 3 * 2, "2*((T // 2) // 3)"),
        (-3 // T, "(-3) // T"),
        (1 - T, "-1*T + 1"),
    ],
)
def test_normal_forms(size, text):
    assert str(size) == text


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    [
        "",
        "1.5",
        "True",
        "T ** 2",
        "T / 2",
        "f(T)",
        "min(T)",
        "min(T, 1, 2)",
        "max(a=1)",
        "T if S else 1",
    ]
    + [
        "T.x",
        "T[0]",
        "lambda: 1",
        "(",
        "\0",
        "f32",
        "nan",
        "5 // 0",
        "T % 0",
        "(" * 500,
        "-" * 9999 + "1",
    ],
)
def test_other_text_is_no_size(text):
    with pytest.raises(GraphError):
        parse_size(text)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["", "1", "a b", "if", "f32", "ﬁ", "é"])
def test_names_that_text_cannot_hold(name):
    with pytest.raises(GraphError):
        symbol(name)


@pytest.mark.quick
def test_guards():
    with pytest.raises(TypeError):
        T + 0.5
    with pytest.raises(GraphError, match="symbol S"):
        evaluate(T * S, {"T": 1})
    with pytest.raises(GraphError, match="/ 0"):
        evaluate(T // (S - 1), {"T": 1, "S": 1})


@pytest.mark.quick
@pytest.mark.parametrize(
    ("size", "value", "found"),
    [
        (T, 5, ("T", 5)),
        (2 * T + 1, 7, ("T", 3)),
        (2 * T, 7, None),
        (T * S, 6, None),
        (T * T, 4, None),
    ]
    + [(T - 5, 0, ("T", 5)), (T + 5, 1, None), (4, 4, None), (T // 2, 1, None)],
)
def test_a_linear_size_binds_its_symbol(size, value, found):
    assert dims.solve(size, value) == found

"""Rotary embeddings in both layouts, whole and partial, and halves that only look alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriting import assert_same_numbers, check, parse
from tilewright.ir.graph import Graph
from tilewright.passes.canonicalize import canonicalize
from tilewright.passes.recognize_rope import recognize_rope


def run(graph: Graph) -> Graph:
    return canonicalize(recognize_rope(canonicalize(graph)))


HALF = """
def g(q: f32[1, 2, S, 8], angle: f32[1, S, 4]):
    lo: f32[1, 2, S, 4] = slice(q, dim=3, start=0, stop=4)
    hi: f32[1, 2, S, 4] = slice(q, dim=3, start=4, stop=8)
    minus: f32[1, 2, S, 4] = neg(hi)
    turned: f32[1, 2, S, 8] = concat(minus, lo, dim=3)
    both: f32[1, S, 8] = concat(angle, angle, dim=2)
    cos_0: f32[1, S, 8] = cos(both)
    scaled: f32[1, S, 8] = mul(cos_0, f32(1.5))
    sin_0: f32[1, S, 8] = sin(both)
    cos_1: f32[1, 1, S, 8] = reshape(scaled, shape=(1, 1, S, 8))
    sin_1: f32[1, 1, S, 8] = reshape(sin_0, shape=(1, 1, S, 8))
    mul_0: f32[1, 2, S, 8] = mul(q, cos_1)
    mul_1: f32[1, 2, S, 8] = mul(turned, sin_1)
    add_0: f32[1, 2, S, 8] = add(mul_0, mul_1)
    return {"y": add_0}
"""
HALF_AFTER = """
def g(q: f32[1, 2, S, 8], angle: f32[1, S, 4]):
    cos_0: f32[1, S, 4] = cos(angle)
    mul_0: f32[1, S, 4] = mul(cos_0, f32(1.5))
    sin_0: f32[1, S, 4] = sin(angle)
    y: f32[1, 2, S, 8] = rope(q, mul_0, sin_0, layout="half")
    return {"y": y}
"""
INTERLEAVED = """
def g(q: f32[1, 2, S, 8], angle: f32[1, S, 4]):
    even: f32[1, 2, S, 4] = slice(q, dim=3, start=0, stop=8, step=2)
    odd: f32[1, 2, S, 4] = slice(q, dim=3, start=1, stop=8, step=2)
    minus: f32[1, 2, S, 4] = neg(odd)
    a: f32[1, 2, S, 4, 1] = reshape(minus, shape=(1, 2, S, 4, 1))
    b: f32[1, 2, S, 4, 1] = reshape(even, shape=(1, 2, S, 4, 1))
    stack: f32[1, 2, S, 4, 2] = concat(a, b, dim=4)
    turned: f32[1, 2, S, 8] = reshape(stack, shape=(1, 2, S, 8))
    one: f32[1, S, 4, 1] = reshape(angle, shape=(1, S, 4, 1))
    two: f32[1, S, 4, 2] = expand(one, shape=(1, S, 4, 2))
    both: f32[1, S, 8] = reshape(two, shape=(1, S, 8))
    cos_0: f32[1, S, 8] = cos(both)
    sin_0: f32[1, S, 8] = sin(both)
    mul_0: f32[1, 2, S, 8] = mul(cos_0, q)
    mul_1: f32[1, 2, S, 8] = mul(sin_0, turned)
    add_0: f32[1, 2, S, 8] = add(mul_1, mul_0)
    return {"y": add_0}
"""
INTERLEAVED_AFTER = """
def g(q: f32[1, 2, S, 8], angle: f32[1, S, 4]):
    cos_0: f32[1, S, 4] = cos(angle)
    sin_0: f32[1, S, 4] = sin(angle)
    y: f32[1, 2, S, 8] = rope(q, cos_0, sin_0, layout="interleaved")
    return {"y": y}
"""
PARTIAL = """
def g(q: f32[1, 2, S, 12], angle: f32[1, S, 4]):
    head: f32[1, 2, S, 8] = slice(q, dim=3, start=0, stop=8)
    rest: f32[1, 2, S, 4] = slice(q, dim=3, start=8, stop=12)
    lo: f32[1, 2, S, 4] = slice(head, dim=3, start=0, stop=4)
    hi: f32[1, 2, S, 4] = slice(head, dim=3, start=4, stop=8)
    cos_0: f32[1, S, 4] = cos(angle)
    sin_0: f32[1, S, 4] = sin(angle)
    lc: f32[1, 2, S, 4] = mul(lo, cos_0)
    hs: f32[1, 2, S, 4] = mul(hi, sin_0)
    hc: f32[1, 2, S, 4] = mul(hi, cos_0)
    ls: f32[1, 2, S, 4] = mul(lo, sin_0)
    first: f32[1, 2, S, 4] = sub(lc, hs)
    second: f32[1, 2, S, 4] = add(hc, ls)
    turned: f32[1, 2, S, 8] = concat(first, second, dim=3)
    y: f32[1, 2, S, 12] = concat(turned, rest, dim=3)
    return {"y": y}
"""
PARTIAL_AFTER = """
def g(q: f32[1, 2, S, 12], angle: f32[1, S, 4]):
    cos_0: f32[1, S, 4] = cos(angle)
    sin_0: f32[1, S, 4] = sin(angle)
    y: f32[1, 2, S, 12] = rope(q, cos_0, sin_0, layout="half")
    return {"y": y}
"""


@pytest.mark.quick
@pytest.mark.parametrize(
    ("before", "after"),
    [(HALF, HALF_AFTER), (INTERLEAVED, INTERLEAVED_AFTER), (PARTIAL, PARTIAL_AFTER)],
    ids=["half", "interleaved", "partial"],
)
def test_golden(before, after):
    check(run, before, after, {"S": 3})


def test_backwards():
    before = HALF.replace("neg(hi)", "neg(lo)").replace("concat(minus, lo", "concat(hi, minus")
    after = HALF_AFTER.replace("    y:", "    neg_0: f32[1, S, 4] = neg(sin_0)\n    y:")
    check(run, before, after.replace("mul_0, sin_0,", "mul_0, neg_0,"), {"S": 3})


NEAR_MISSES = {
    "other halves": HALF.replace("concat(angle, angle,", "concat(angle, n,").replace(
        "    both:", "    n: f32[1, S, 4] = neg(angle)\n    both:"
    ),
    "minus on the wrong half": HALF.replace("neg(hi)", "neg(lo)").replace(
        "concat(minus, lo", "concat(minus, hi"
    ),
    "not turned": HALF.replace("concat(minus, lo, dim=3)", "concat(lo, minus, dim=3)"),
    "turned twice": HALF.replace("concat(minus, lo, dim=3)", "concat(minus, m2, dim=3)").replace(
        "    turned", "    m2: f32[1, 2, S, 4] = neg(lo)\n    turned"
    ),
    "no minus": HALF.replace("neg(hi)", "exp(hi)"),
    "sin of another": HALF.replace("= sin(both)", "= exp(d)").replace(
        "    both:", "    n: f32[1, S, 4] = neg(angle)\n"
        "    d: f32[1, S, 8] = concat(angle, n, dim=2)\n    both:"
    ),
    "interleaved x, half tables": INTERLEAVED.replace(
        "both: f32[1, S, 8] = reshape(two, shape=(1, S, 8))",
        "both: f32[1, S, 8] = concat(angle, angle, dim=2)",
    ),
    "signs exchanged": PARTIAL.replace("sub(lc, hs)", "add(lc, hs)").replace(
        "add(hc, ls)", "sub(hc, ls)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    graph = parse(NEAR_MISSES[name])
    result = run(graph)
    assert "rope" not in {n.op for n in result.nodes}
    assert_same_numbers(graph, result, {"S": 3}, 1e-5)


def test_rest_of_another_value_is_not_partial():
    text = PARTIAL.replace("rest: f32[1, 2, S, 4] = slice(q, dim=3, start=8, stop=12)",
                           "rest: f32[1, 2, S, 4] = slice(q, dim=3, start=7, stop=11)")  # fmt: skip
    result = run(parse(text))
    rope = next(n for n in result.nodes if n.op == "rope")
    assert rope.shape[-1] == 8


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([HALF, INTERLEAVED, PARTIAL]),
    st.integers(0, 9),
)
def test_numbers_for_all_shapes(tokens, heads, text, seed):
    graph = parse(text.replace("1, 2, S", f"1, {heads}, S").replace("f32", "f64"))
    result = run(graph)
    assert "rope" in {n.op for n in result.nodes}
    assert_same_numbers(graph, result, {"S": tokens}, seed=seed)

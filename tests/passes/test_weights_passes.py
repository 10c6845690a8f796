"""Folding of weights and buffers, merged projections, gates."""

from __future__ import annotations

import pytest
import torch

from rewriting import Held, assert_same_numbers, check, parse
from tilewright.passes.fold_buffers import fold_buffers
from tilewright.passes.fold_weights import fold_weights
from tilewright.passes.merge_projections import merge_projections, merged_name
from tilewright.passes.recognize_gated import recognize_gated


@pytest.mark.quick
def test_fold_weights_golden():
    before = """
def g(x: f32[S, 4]):
    w: f32[4, 6] = param("a.weight")
    permute_0: f32[6, 4] = permute(w, dims=(1, 0))
    mul_0: f32[6, 4] = mul(permute_0, f32(0.5))
    linear_0: f32[S, 6] = linear(x, mul_0)
    return {"y": linear_0}
"""
    after = """
def g(x: f32[S, 4]):
    w: f32[6, 4] = param("a.weight.permute.mul")
    linear_0: f32[S, 6] = linear(x, w)
    return {"y": linear_0}
"""
    graph = check(fold_weights, before, after, {"S": 3})
    expression = str(graph.weights["a.weight.permute.mul"])
    assert expression == 'mul(permute(held("a.weight"), dims=(1, 0)), 0.5)'


@pytest.mark.parametrize(
    "line",
    [
        "y: f32[40, 4] = expand(w, shape=(40, 4))",
        "y: f32[1, 4] = tanh(w)",
        "y: f32[S, 4] = add(w, x)",
    ],
)
def test_what_grows_or_has_no_word_is_not_folded(line):
    text = f"""
def g(x: f32[S, 4]):
    w: f32[1, 4] = param("w")
    {line}
    return {{"y": y}}
"""
    check(fold_weights, text, None, {"S": 3})


def test_two_folds_of_one_weight_get_two_names():
    graph = parse("""
def g(x: f32[S, 4]):
    w: f32[4] = param("w")
    add_0: f32[4] = add(w, f32(1.0))
    add_1: f32[4] = add(w, f32(2.0))
    mul_0: f32[S, 4] = mul(x, add_0)
    mul_1: f32[S, 4] = mul(mul_0, add_1)
    return {"y": mul_1}
""")
    result = fold_weights(graph)
    assert set(result.weights) == {"w.add", "w.add.2"}
    assert_same_numbers(graph, result, {"S": 2}, 1e-5)


MERGE = """
def g(x: f32[S, 4]):
    q: f32[6, 4] = param("attn.q.weight")
    linear_0: f32[S, 6] = linear(x, q)
    k: f32[2, 4] = param("attn.k.weight")
    kb: f32[2] = param("attn.k.bias")
    linear_1: f32[S, 2] = linear(x, k, kb)
    neg_0: f32[S, 6] = neg(linear_0)
    return {"q": neg_0, "k": linear_1}
"""


@pytest.mark.quick
def test_merge_golden():
    after = """
def g(x: f32[S, 4]):
    w: f32[8, 4] = param("attn.q+k.weight")
    b: f32[8] = param("attn.q.weight.no_bias+k.bias")
    linear_0: f32[S, 8] = linear(x, w, b)
    slice_0: f32[S, 6] = slice(linear_0, dim=1, start=0, stop=6)
    neg_0: f32[S, 6] = neg(slice_0)
    slice_1: f32[S, 2] = slice(linear_0, dim=1, start=6, stop=8)
    return {"q": neg_0, "k": slice_1}
"""
    check(merge_projections, MERGE, after, {"S": 3})


def test_merge_follows_merged_inputs():
    text = """
def g(x: f32[S, 4]):
    a: f32[4, 4] = param("a")
    b: f32[4, 4] = param("b")
    c: f32[4, 4] = param("c")
    d: f32[4, 4] = param("d")
    linear_0: f32[S, 4] = linear(x, a)
    linear_1: f32[S, 4] = linear(x, b)
    add_0: f32[S, 4] = add(linear_0, linear_1)
    linear_2: f32[S, 4] = linear(add_0, c)
    linear_3: f32[S, 4] = linear(add_0, d)
    return {"y": linear_2, "z": linear_3}
"""
    graph = parse(text)
    result = merge_projections(graph)
    assert sorted(result.weights) == ["a+b", "c+d"]
    assert_same_numbers(graph, result, {"S": 3}, 1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("linear(x, k, kb)", "linear(x2, k, kb)"),
        ("neg_0: f32[S, 6] = neg(linear_0)", "neg_0: f32[S, 4] = linear(linear_0, q6)"),
    ],
    ids=["another input", "a weight used twice"],
)
def test_near_misses_are_not_merged(old, new):
    text = MERGE.replace(old, new).replace("    k:", "    x2: f32[S, 4] = exp(x)\n    k:")
    text = text.replace("    neg_0", "    q6: f32[4, 6] = reshape(q, shape=(4, 6))\n    neg_0")
    check(merge_projections, text, str(parse(text)), {"S": 3})


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["l.0.q.weight", "l.0.k.weight"], "l.0.q+k.weight"),
        (["a.q.w", "b.m.k.w"], "a.q+b.m.k.w"),
        (["q", "k"], "q+k"),
    ],
)
def test_merged_name(names, wanted):
    assert merged_name(names) == wanted


GATED = """
def g(a: f32[S, 4], b: f32[S, 4]):
    act: f32[S, 4] = silu(a)
    mul_0: f32[S, 4] = mul(b, act)
    return {"y": mul_0}
"""


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "activation"),
    [
        ("silu(a)", "silu"),
        ("gelu(a)", "gelu"),
        ('gelu(a, approximate="tanh")', "gelu_tanh"),
        ("relu(a)", "relu"),
        ("sigmoid(a)", "sigmoid"),
    ],
)
def test_gated_golden(call, activation):
    after = f"""
def g(a: f32[S, 4], b: f32[S, 4]):
    gated_0: f32[S, 4] = gated(a, b, activation="{activation}")
    return {{"y": gated_0}}
"""
    check(recognize_gated, GATED.replace("silu(a)", call), after, {"S": 3})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("silu(a)", "tanh(a)"),
        ("mul(b, act)", "mul(a, act)"),
        ("mul(b, act)", "add(b, act)"),
        ('{"y": mul_0}', '{"y": mul_0, "z": act}'),
    ],
)
def test_gated_near_misses(old, new):
    check(recognize_gated, GATED.replace(old, new), None, {"S": 3})


POSITIONS = """
def g(x: f32[S, 4]):
    table: f32[9, 4] = param("table")
    ids: i64[1, 9] = param("ids")
    cut: i64[1, S] = slice(ids, dim=1, start=0, stop=S)
    rows: f32[1, S, 4] = embedding(table, cut)
    y: f32[1, S, 4] = add(x, rows)
    return {"y": y}
"""


def test_position_buffer():
    weights = {"ids": Held(torch.arange(9)[None], "ids"), "table": Held(torch.randn(9, 4), "table")}
    graph = parse(POSITIONS, weights=weights)
    result = fold_buffers(graph)
    assert "iota" in {n.op for n in result.nodes} and set(result.weights) == {"table"}
    assert_same_numbers(graph, result, {"S": 3}, 1e-6)


def test_other_positions_are_kept():
    weights = {"ids": Held(torch.arange(9)[None] // 2, "ids")}
    check(fold_buffers, POSITIONS, None, {"S": 3}, weights=weights)


def test_a_square_weight_is_not_loaded():
    class Trap(Held):
        def load(self):
            raise AssertionError("loaded")

    text = """
def g(x: f32[S, 4]):
    w: f32[4, 4] = param("w")
    y: f32[S, 4] = linear(x, w)
    return {"y": y}
"""
    fold_buffers(parse(text, weights={"w": Trap(torch.ones(4, 4), "w")}))

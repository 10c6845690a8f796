"""Norms in the spellings of Hugging Face models, and near misses that must stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewriting import assert_same_numbers, check, parse
from tilewright.ir.graph import Graph
from tilewright.passes.canonicalize import canonicalize
from tilewright.passes.fold_weights import fold_weights
from tilewright.passes.recognize_norm import recognize_norm


def run(graph: Graph) -> Graph:
    return recognize_norm(fold_weights(canonicalize(graph)))


RMS = """
def g(x: f32[S, 8]):
    w: f32[8] = param("w")
    mul_0: f32[S, 8] = mul(x, x)
    mean_0: f32[S, 1] = mean(mul_0, dims=(1,), keepdim=True)
    add_0: f32[S, 1] = add(mean_0, f32(1e-06))
    rsqrt_0: f32[S, 1] = rsqrt(add_0)
    mul_1: f32[S, 8] = mul(x, rsqrt_0)
    mul_2: f32[S, 8] = mul(w, mul_1)
    return {"y": mul_2}
"""
RMS_AFTER = """
def g(x: f32[S, 8]):
    w: f32[8] = param("w")
    y: f32[S, 8] = rms_norm(x, w, eps=1e-06)
    return {"y": y}
"""


@pytest.mark.quick
def test_rms_norm_golden():
    check(run, RMS, RMS_AFTER, {"S": 3})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mul_0: f32[S, 8] = mul(x, x)", "mul_0: f32[S, 8] = pow(x, f32(2.0))"),
        ("rsqrt_0: f32[S, 1] = rsqrt(add_0)", "rsqrt_0: f32[S, 1] = pow(add_0, f32(-0.5))"),
        (
            "rsqrt_0: f32[S, 1] = rsqrt(add_0)\n    mul_1: f32[S, 8] = mul(x, rsqrt_0)",
            "rsqrt_0: f32[S, 1] = sqrt(add_0)\n    mul_1: f32[S, 8] = div(x, rsqrt_0)",
        ),
        (
            "mean_0: f32[S, 1] = mean(mul_0, dims=(1,), keepdim=True)",
            "sum_0: f32[S, 1] = sum(mul_0, dims=(1,), keepdim=True)\n"
            "    mean_0: f32[S, 1] = div(sum_0, f32(8.0))",
        ),
        (
            "mean_0: f32[S, 1] = mean(mul_0, dims=(1,), keepdim=True)",
            "flat: f32[S] = mean(mul_0, dims=(1,))\n"
            "    mean_0: f32[S, 1] = reshape(flat, shape=(S, 1))",
        ),
    ],
)
def test_rms_norm_spellings(old, new):
    check(run, RMS.replace(old, new), RMS_AFTER, {"S": 3})


def test_rms_norm_of_bfloat16():
    before = """
def g(x: bf16[S, 8]):
    w: bf16[8] = param("w")
    wide: f32[S, 8] = cast(x, dtype=f32)
    pow_0: f32[S, 8] = pow(wide, f32(2.0))
    mean_0: f32[S, 1] = mean(pow_0, dims=(1,), keepdim=True)
    add_0: f32[S, 1] = add(mean_0, f32(1e-06))
    rsqrt_0: f32[S, 1] = rsqrt(add_0)
    mul_0: f32[S, 8] = mul(wide, rsqrt_0)
    narrow: bf16[S, 8] = cast(mul_0, dtype=bf16)
    mul_1: bf16[S, 8] = mul(w, narrow)
    return {"y": mul_1}
"""
    after = RMS_AFTER.replace("f32", "bf16").replace("eps=1e-06", "eps=1e-06, stepwise=True")
    check(run, before, after, {"S": 3}, tolerance=0.0)


def test_gemma_norm():
    before = RMS.replace("mul(w, mul_1)", "mul(mul_1, one)").replace(
        "    mul_0", "    one: f32[8] = add(w, f32(1.0))\n    mul_0"
    )
    after = RMS_AFTER.replace('param("w")', 'param("w.add")').replace("w: ", "w_add: ")
    result = check(run, before, after.replace("x, w,", "x, w_add,"), {"S": 3})
    assert str(result.weights["w.add"]) == 'add(held("w"), 1.0)'


def test_norm_without_weight_or_shared_keeps_what_others_read():
    before = RMS.replace('{"y": mul_2}', '{"y": mul_2, "z": mul_1}')
    result = run(parse(before))
    assert [n.op for n in result.calls()] == ["rms_norm", "mul"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rsqrt_0: f32[S, 1] = rsqrt(add_0)", "s: f32[S, 1] = sqrt(mean_0)\n"
         "    t: f32[S, 1] = add(s, f32(1e-06))\n    rsqrt_0: f32[S, 1] = reciprocal(t)"),
        ("mul_0: f32[S, 8] = mul(x, x)", "mul_0: f32[S, 8] = mul(x, w)"),
        ("mul_1: f32[S, 8] = mul(x, rsqrt_0)", "mul_1: f32[S, 8] = mul(mul_0, rsqrt_0)"),
        ("f32[S, 1] = mean(mul_0, dims=(1,)", "f32[1, 8] = mean(mul_0, dims=(0,)"),
    ],
)  # fmt: skip
def test_near_misses(old, new):
    text = RMS.replace(old, new)
    if "dims=(0,)" in new:
        text = text.replace("f32[S, 1]", "f32[1, 8]")
    graph = parse(text)
    result = run(graph)
    assert "rms_norm" not in {n.op for n in result.nodes}
    assert_same_numbers(graph, result, {"S": 3}, 1e-5)


LAYER = """
def g(x: f32[S, 8]):
    w: f32[8] = param("w")
    b: f32[8] = param("b")
    mean_0: f32[S, 1] = mean(x, dims=(1,), keepdim=True)
    sub_0: f32[S, 8] = sub(x, mean_0)
    pow_0: f32[S, 8] = pow(sub_0, f32(2.0))
    var: f32[S, 1] = mean(pow_0, dims=(1,), keepdim=True)
    add_0: f32[S, 1] = add(var, f32(1e-05))
    sqrt_0: f32[S, 1] = sqrt(add_0)
    div_0: f32[S, 8] = div(sub_0, sqrt_0)
    mul_0: f32[S, 8] = mul(w, div_0)
    add_1: f32[S, 8] = add(mul_0, b)
    return {"y": add_1}
"""


@pytest.mark.quick
def test_layer_norm_golden():
    after = """
def g(x: f32[S, 8]):
    w: f32[8] = param("w")
    b: f32[8] = param("b")
    y: f32[S, 8] = layer_norm(x, w, b, eps=1e-05)
    return {"y": y}
"""
    check(run, LAYER, after, {"S": 3})


def test_layer_norm_needs_its_own_mean():
    result = run(parse(LAYER.replace("sub(x, mean_0)", "sub(x, b)")))
    assert "layer_norm" not in {n.op for n in result.nodes}


@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from([RMS, LAYER]))
def test_numbers_for_all_shapes(tokens, width, text):
    wide = text.replace("f32", "f64").replace("8", str(width))
    graph = parse(wide)
    assert_same_numbers(graph, run(graph), {"S": tokens})


def test_same_as_torch():
    graph = run(parse(LAYER))
    x = torch.randn(3, 8)
    from tilewright.ir.interpreter import interpret

    w, b = (graph.weights[n].load() for n in ("w", "b"))
    wanted = torch.nn.functional.layer_norm(x, (8,), w, b, 1e-5)
    torch.testing.assert_close(interpret(graph, [x])[0], wanted)

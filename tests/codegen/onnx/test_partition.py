"""Regions around what ONNX Runtime cannot run, and what holds graphs of its own."""

from __future__ import annotations

import pytest
import torch

from onnx_running import running

FOREIGN = """\
def g(x: f32[N, 4]):
    exp_0: f32[N, 4] = exp(x)
    sinc_0: f32[N, 4] = aten(exp_0, target="aten.sinc.default", positional=(("t", 0),),
                             named=(), types=(f32[N, 4],))
    cos_0: f32[N, 4] = cos(exp_0)
    add_0: f32[N, 4] = add(sinc_0, cos_0)
    neg_0: f32[N, 4] = neg(x)
    return {"sum": add_0, "neg": neg_0}
"""


@pytest.mark.quick
def test_a_foreign_op_in_the_middle_cuts_two_convex_regions() -> None:
    engine = running(FOREIGN)
    assert engine.kernels == [
        "onnxruntime/onnx/model_0.onnx",
        "eager/aten",
        "onnxruntime/onnx/model_1.onnx",
    ]
    assert engine.lowered.notes == ("aten runs on eager: no ONNX form",)
    first, _, last = engine.program.calls
    assert set(first.results) >= {"exp_0", "cos_0", "neg_0"}  # what has no way back stays together
    assert last.origin == ("add",)
    for rows in (1, 5):
        engine.check([torch.randn(rows, 4)])


def test_two_foreign_ops_in_a_row_need_no_region_between_them() -> None:
    call = 'aten({}, target="aten.sinc.default", positional=(("t", 0),), named=(), types=(f32[4],))'
    text = (
        "def g(x: f32[4]):\n"
        f"    a: f32[4] = {call.format('x')}\n"
        f"    b: f32[4] = {call.format('a')}\n"
        '    c: f32[4] = exp(b)\n    return {"c": c}\n'
    )
    engine = running(text)
    assert engine.kernels == ["eager/aten", "eager/aten", "onnxruntime/onnx/model_0.onnx"]
    engine.check([torch.randn(4)])


def test_several_results_of_a_foreign_op() -> None:
    text = (
        "def g(x: f32[4, 4]):\n"
        '    pair: (f32[4, 4], f32[4, 4],) = aten(x, target="aten.linalg_qr.default", '
        'positional=(("t", 0),), named=(), types=(f32[4, 4], f32[4, 4]))\n'
        "    q: f32[4, 4] = item(pair, index=0)\n"
        "    r: f32[4, 4] = item(pair, index=1)\n"
        "    back: f32[4, 4] = matmul(q, r)\n"
        '    return {"back": back, "r": r}\n'
    )
    engine = running(text)
    assert engine.kernels == ["eager/aten", "onnxruntime/onnx/model_0.onnx"]
    engine.check([torch.randn(4, 4)])


def test_constants_reach_foreign_ops_and_outputs() -> None:
    text = (
        "def g(x: f32[3]):\n"
        "    steps: f32[3] = iota(size=3, dtype=f32)\n"
        "    twice: f32[3] = mul(steps, f32(2.0))\n"
        '    a: f32[3] = aten(twice, target="aten.sinc.default", positional=(("t", 0),), '
        "named=(), types=(f32[3],))\n"
        "    b: f32[3] = add(x, a)\n    c: f32[3] = add(b, twice)\n"
        '    return {"c": c, "twice": twice}\n'
    )
    running(text).check([torch.randn(3)])


def test_an_output_that_is_an_input_or_given_twice() -> None:
    text = 'def g(x: f32[3]):\n    y: f32[3] = exp(x)\n    return {"a": y, "b": y, "c": x}\n'
    running(text).check([torch.randn(3)])


def test_a_condition_becomes_if() -> None:
    text = """\
def g(x: f32[N, 2], y: f32[N, 2]):
    def yes(a: f32[N, 2], b: f32[N, 2]):
        exp_0: f32[N, 2] = exp(a)
        add_0: f32[N, 2] = add(exp_0, b)
        return {"out0": add_0, "out1": a}
    def no(a: f32[N, 2], b: f32[N, 2]):
        iota_0: f32[N] = iota(size=N, dtype=f32)
        col: f32[N, 1] = reshape(iota_0, shape=(N, 1))
        mul_0: f32[N, 2] = mul(a, col)
        return {"out0": mul_0, "out1": b}
    total: f32[()] = sum(x, dims=(0, 1))
    positive: bool[()] = gt(total, f32(0.0))
    both: (f32[N, 2], f32[N, 2],) = cond(positive, x, y, then=yes, otherwise=no)
    first: f32[N, 2] = item(both, index=0)
    second: f32[N, 2] = item(both, index=1)
    return {"first": first, "second": second}
"""
    engine = running(text)
    assert engine.whole, engine.lowered.notes
    for sign in (1.0, -1.0):
        engine.check([sign * torch.rand(3, 2), torch.randn(3, 2)])


def test_a_foreign_op_within_a_branch_sends_the_condition_to_eager() -> None:
    text = """\
def g(x: f32[2], p: bool[()]):
    def yes(a: f32[2]):
        s: f32[2] = aten(a, target="aten.sinc.default", positional=(("t", 0),),
                         named=(), types=(f32[2],))
        return {"out0": s}
    def no(a: f32[2]):
        n: f32[2] = neg(a)
        return {"out0": n}
    y: f32[2] = cond(p, x, then=yes, otherwise=no)
    return {"y": y}
"""
    engine = running(text)
    assert engine.kernels == ["eager/cond"]
    assert engine.lowered.notes == ("cond runs on eager: aten within: no ONNX form",)
    engine.check([torch.randn(2), torch.tensor(True)])


def test_fused_bodies_are_written_out() -> None:
    text = """\
def g(x: f32[N, 8], y: f32[N, 8]):
    def body(a: f32[N, 8], b: f32[N, 8]):
        add_0: f32[N, 8] = add(a, b)
        w: f32[N, 8] = rms_norm(add_0, eps=1e-05)
        return {"out0": w, "out1": add_0}
    both: (f32[N, 8], f32[N, 8],) = fused(x, y, body=body, kind="reduction")
    w: f32[N, 8] = item(both, index=0)
    s: f32[N, 8] = item(both, index=1)
    return {"w": w, "s": s}
"""
    engine = running(text)
    assert engine.whole and engine.program.calls[0].origin == ("add", "rms_norm")
    engine.check([torch.randn(3, 8), torch.randn(3, 8)])


SIZES = {
    "S": "S", "sum": "S + 3", "product": "2*S*B", "quotient": "(S + 1) // 2 + 1",
    "rest": "S % 3 + 1", "least": "min(S, 4)", "most": "max(S, 4)",
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_sizes_that_only_the_inputs_know(size: str) -> None:
    text = (
        "def g(x: f32[B, S]):\n"
        f"    steps: f32[{size}] = iota(size={size}, dtype=f32)\n"
        f"    number: f32[()] = dim_value(size={size}, dtype=f32)\n"
        f"    y: f32[{size}] = mul(steps, number)\n"
        f"    wide: f32[B, {size}] = expand(y, shape=(B, {size}))\n"
        f"    flat: f32[B*({size})] = reshape(wide, shape=(B*({size}),))\n"
        "    cut: f32[B, 2] = slice(x, dim=1, start=S - 2, stop=S)\n"
        '    return {"flat": flat, "cut": cut}\n'
    )
    engine = running(text)
    assert engine.whole, engine.lowered.notes
    for shape in ((2, 3), (3, 7), (1, 2)):
        engine.check([torch.randn(shape)])


def test_a_size_that_an_expression_binds() -> None:
    text = (
        "def g(x: f32[2*S + 1]):\n    y: f32[S] = iota(size=S, dtype=f32)\n"
        "    z: f32[S] = slice(x, dim=0, start=1, stop=S + 1)\n"
        '    t: f32[S] = add(y, z)\n    return {"t": t}\n'
    )
    for size in (3, 9):
        running(text).check([torch.randn(size)])

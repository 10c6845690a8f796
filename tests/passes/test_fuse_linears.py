"""fuse_linears: goldens of what products take in, and the numbers of before."""

from __future__ import annotations

import pytest

from rewriting import assert_same_numbers, parse
from tilewright.ir.graph import Graph
from tilewright.ir.ops.control import body_of
from tilewright.ir.parser import parse_graph
from tilewright.ir.verifier import verify
from tilewright.passes.fuse_linears import MAX_EPILOGUE, fuse_linears

HEAD = """
def g(x: f32[B, 8], y: f32[B, 8]):
    w: f32[8] = param("w")
    up: f32[16, 8] = param("up")
    down: f32[8, 8] = param("down")
    bias: f32[8] = param("bias")
"""


def graph(*lines: str, out: str) -> Graph:
    body = "".join(f"    {line}\n" for line in lines)
    return parse(f"{HEAD}{body}    return {{{out}}}\n")


def groups(found: Graph) -> list[list[str]]:
    """What the bodies compute, in order."""
    nodes = [node for node in found.nodes if node.op == "fused"]
    assert all(node.attr("kind") == "linear" for node in nodes)
    return [[inner.op for inner in body_of(node).calls()] for node in nodes]


def check(before: Graph, wanted: list[list[str]]) -> Graph:
    found = fuse_linears(before)
    verify(found)
    assert groups(found) == wanted
    assert str(parse_graph(str(found))) == str(found)
    return found


NORM = "n: f32[B, 8] = rms_norm(x, w, eps=1e-06)"
UP = "u: f32[B, 16] = linear(n, up)"
FIRST = "a: f32[B, 8] = slice(u, dim=1, start=0, step=1, stop=8)"
SECOND = "b: f32[B, 8] = slice(u, dim=1, start=8, step=1, stop=16)"
GATED = 'g: f32[B, 8] = gated(a, b, activation="silu")'
DOWN = "d: f32[B, 8] = linear(g, down)"
ADD = "r: f32[B, 8] = add(y, d)"


@pytest.mark.quick
def test_a_feed_forward_layer_is_two_products() -> None:
    found = check(
        graph(NORM, UP, FIRST, SECOND, GATED, DOWN, ADD, out='"r": r'),
        [["rms_norm", "linear", "slice", "slice", "gated"], ["linear", "add"]],
    )
    assert [node.op for node in found.calls()] == ["fused", "fused"]
    names = [body_of(node).name.rpartition("_")[0] for node in found.calls()]
    assert names == ["rms_norm_linear_gated", "linear_add"]


def test_a_norm_that_others_read_stays() -> None:
    read = graph(NORM, UP, "m: f32[B, 8] = mul(n, y)", out='"u": u, "m": m')
    check(read, [["linear"]])
    check(graph(NORM, UP, out='"u": u, "n": n'), [["linear"]])


def test_a_norm_is_computed_by_each_product_that_reads_it() -> None:
    both = graph(NORM, UP, "v: f32[B, 8] = linear(n, down)", out='"u": u, "v": v')
    check(both, [["rms_norm", "linear"], ["rms_norm", "linear"]])


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (("d: f32[B, 8] = linear(x, down, bias)", "e: f32[B, 8] = gelu(d)"), ["linear", "gelu"]),
        (("d: f32[B, 8] = linear(x, down)", "e: f32[B, 8] = mul(d, d)"), ["linear", "mul"]),
        (("d: f32[B, 8] = linear(x, down)", "e: f32[B, 8] = add(d, w)"), ["linear", "add"]),
        (("d: f32[B, 8] = linear(x, down)", "e: f32[B, 8] = softmax(d, dim=1)"), ["linear"]),
        (
            ("d: f32[B, 8] = linear(x, down)", "e: f32[B, 4] = slice(d, dim=1, start=0, stop=4)"),
            ["linear"],
        ),
    ],
)
def test_what_an_epilogue_takes(lines: tuple[str, ...], wanted: list[str]) -> None:
    check(graph(*lines, out='"e": e'), [wanted])


def test_a_chain_ends_where_a_value_is_needed_twice() -> None:
    lines = ("d: f32[B, 8] = linear(x, down)", "r: f32[B, 8] = add(y, d)")
    more = ("s: f32[B, 8] = silu(r)", "t: f32[B, 8] = mul(r, s)")
    check(graph(*lines, *more, out='"t": t'), [["linear", "add"]])
    check(graph(*lines, "s: f32[B, 8] = silu(r)", out='"r": r, "s": s'), [["linear", "add"]])


def test_unequal_parts_are_not_halves() -> None:
    first = "a: f32[B, 6] = slice(u, dim=1, start=0, step=1, stop=6)"
    second = "b: f32[B, 10] = slice(u, dim=1, start=6, step=1, stop=16)"
    check(graph(NORM, UP, first, second, out='"a": a, "b": b'), [["rms_norm", "linear"]])


def test_a_long_chain_is_cut() -> None:
    lines = ["d: f32[B, 8] = linear(x, down)", "s0: f32[B, 8] = silu(d)"]
    lines += [f"s{i}: f32[B, 8] = silu(s{i - 1})" for i in range(1, 12)]
    (found,) = groups(fuse_linears(graph(*lines, out='"s": s11')))
    assert len(found) == 1 + MAX_EPILOGUE


@pytest.mark.parametrize(
    "text",
    [
        "def g(x: f64[B, 8], w: f64[4, 8]):\n    y: f64[B, 4] = linear(x, w)\n",
        "def g(x: f32[B, 8], w: f32[4, 8]):\n    y: f32[B, 4] = linear(x, w)\n",
        "def g(x: f32[B, 3, 8]):\n    w: f32[4, 8] = param('w')\n"
        "    y: f32[B, 3, 4] = linear(x, w)\n",
    ],
)
def test_products_that_no_decode_kernel_takes_stay(text: str) -> None:
    graph = parse(text.replace("'", '"') + '    return {"y": y}\n')
    assert fuse_linears(graph) == graph


CODED = """
def g(x: f32[B, 8], y: f32[B, 8]):
    w: f32[8] = param("w")
    codes: u8[16, 4] = param("codes")
    scale: bf16[16, 2] = param("scale")
    zero: u8[16, 2] = param("zero")
    up: f32[16, 8] = dequantize(codes, scale, zero, dtype=f32, group=4, width=8)
    n: f32[B, 8] = rms_norm(x, w, eps=1e-06)
    u: f32[B, 16] = linear(n, up)
    a: f32[B, 8] = slice(u, dim=1, start=0, step=1, stop=8)
    b: f32[B, 8] = slice(u, dim=1, start=8, step=1, stop=16)
    g: f32[B, 8] = gated(a, b, activation="silu")
    down_codes: i8[8, 8] = param("down_codes")
    down_scale: f32[8, 1] = param("down_scale")
    down: f32[8, 8] = dequantize(down_codes, down_scale, dtype=f32)
    d: f32[B, 8] = linear(g, down)
    r: f32[B, 8] = add(y, d)
    return {"r": r}
"""


@pytest.mark.quick
def test_weights_are_decoded_within_their_products() -> None:
    before = parse(CODED)
    found = check(
        before,
        [
            ["rms_norm", "dequantize", "linear", "slice", "slice", "gated"],
            ["dequantize", "linear", "add"],
        ],
    )
    first, second = (node for node in found.nodes if node.op == "fused")
    assert [str(node.type) for node in body_of(first).inputs] == [
        *("f32[B, 8]", "f32[8]", "u8[16, 4]", "bf16[16, 2]", "u8[16, 2]")
    ]
    assert not any(node.op == "dequantize" for node in found.nodes)
    assert {str(node.type) for node in second.operands} == {*("f32[B, 8]", "i8[8, 8]", "f32[8, 1]")}
    assert_same_numbers(before, found, {"B": 5}, tolerance=0)


SCALED = """
def g(x: f32[B, 8], y: f32[B, 8]):
    w: f32[8] = param("w")
    codes: i8[16, 8] = param("codes")
    scale: f32[16, 1] = param("scale")
    n: f32[B, 8] = rms_norm(x, w, eps=1e-06)
    rows: (i8[B, 8], f32[B, 1],) = quantize_rows(n, dtype=i8)
    q: i8[B, 8] = item(rows, index=0)
    s: f32[B, 1] = item(rows, index=1)
    u: f32[B, 16] = scaled_linear(q, s, codes, scale, dtype=f32)
    a: f32[B, 8] = slice(u, dim=1, start=0, step=1, stop=8)
    b: f32[B, 8] = slice(u, dim=1, start=8, step=1, stop=16)
    g: f32[B, 8] = gated(a, b, activation="silu")
    static: f32[1] = param("static")
    down_codes: i8[8, 8] = param("down_codes")
    down_scale: f32[1, 1] = param("down_scale")
    bias: f32[8] = param("bias")
    more: (i8[B, 8], f32[B, 1],) = quantize_rows(g, static, dtype=i8)
    p: i8[B, 8] = item(more, index=0)
    d: f32[B, 8] = scaled_linear(p, static, down_codes, down_scale, bias, dtype=f32, rows=0)
    r: f32[B, 8] = add(y, d)
    return {"r": r}
"""
ROUNDING = ["rms_norm", "quantize_rows", "scaled_linear", "slice", "slice", "gated"]


@pytest.mark.quick
def test_rows_are_rounded_within_their_products() -> None:
    before = parse(SCALED)
    found = check(before, [ROUNDING, ["quantize_rows", "scaled_linear", "add"]])
    assert not any(node.op in ("quantize_rows", "item") for node in found.nodes)
    assert_same_numbers(before, found, {"B": 5}, tolerance=0)


def test_a_norm_that_is_also_read_as_it_is_stays_outside() -> None:
    before = parse(SCALED.replace("r: f32[B, 8] = add(y, d)", "r: f32[B, 8] = add(n, d)"))
    check(before, [ROUNDING[1:], ["quantize_rows", "scaled_linear", "add"]])


def test_codes_from_elsewhere_stay() -> None:
    lines = SCALED.replace("(p, static, down_codes", "(p, static, other")
    other = lines.replace(
        "    p: i8", "    other: i8[8, 8] = permute(down_codes, dims=(1, 0))\n    p: i8"
    )
    check(parse(other), [ROUNDING])


def test_a_weight_of_computed_codes_stays_outside() -> None:
    computed = CODED.replace(
        "down: f32", "moved: i8[8, 8] = permute(down_codes, dims=(1, 0))\n    down: f32"
    ).replace("dequantize(down_codes", "dequantize(moved")
    check(parse(computed), [["rms_norm", "dequantize", "linear", "slice", "slice", "gated"]])


def test_numbers_stay() -> None:
    before = graph(NORM, UP, FIRST, SECOND, GATED, DOWN, ADD, out='"r": r')
    assert_same_numbers(before, fuse_linears(before), {"B": 5}, tolerance=0)


def test_equal_structures_share_a_body() -> None:
    lines = ("c: f32[B, 8] = linear(x, down)", "d: f32[B, 8] = linear(y, other)")
    found = fuse_linears(
        parse(
            HEAD
            + '    other: f32[8, 8] = param("other")\n'
            + "".join(f"    {line}\n" for line in lines)
            + '    return {"c": c, "d": d}\n'
        )
    )
    bodies = {node.attr("body") for node in found.nodes if node.op == "fused"}
    assert len(bodies) == 1

"""Fusion in IR text: what joins and what must not."""

from __future__ import annotations

import pytest

from rewriting import assert_same_numbers, check, parse
from tilewright.ir.build import make
from tilewright.ir.dims import evaluate
from tilewright.ir.graph import Graph
from tilewright.ir.ops.control import body_of
from tilewright.ir.schema import schema
from tilewright.passes.fuse import fuse
from tilewright.passes.fuse_groups import MAX_OPERANDS
from tilewright.passes.fuse_inline import inline_fused

SIZES = {"T": 5, "R": 3, "S": 2}


def fused_stems(text: str) -> list[str]:
    """What each fused node does, hashes cut off; numbers and the way back are checked too."""
    graph = parse(text.replace("f32", "f64"))
    result = fuse(graph)
    assert_same_numbers(graph, result, SIZES, tolerance=0)
    assert inline_fused(result) == graph
    assert fuse(result) == result
    return [name.rsplit("_", 1)[0] for name in body_names(result)]


def body_names(graph: Graph) -> list[str]:
    return [body_of(node).name for node in graph.nodes if node.op == "fused"]


MLP = """
def g(x: f32[T, 8], y: f32[T, 8], w: f32[8], up: f32[16, 8], down: f32[8, 8]):
    add_0: f32[T, 8] = add(x, y)
    rms_norm_0: f32[T, 8] = rms_norm(add_0, w, eps=1e-06)
    linear_0: f32[T, 16] = linear(rms_norm_0, up)
    slice_0: f32[T, 8] = slice(linear_0, dim=1, start=0, step=1, stop=8)
    slice_1: f32[T, 8] = slice(linear_0, dim=1, start=8, step=1, stop=16)
    gated_0: f32[T, 8] = gated(slice_0, slice_1, activation="silu")
    linear_1: f32[T, 8] = linear(gated_0, down)
    add_1: f32[T, 8] = add(add_0, linear_1)
    return {"out0": add_1}
"""
MLP_FUSED = """
def g(x: f32[T, 8], y: f32[T, 8], w: f32[8], up: f32[16, 8], down: f32[8, 8]):
    def add_rms_norm_e1a5(a: f32[T, 8], b: f32[T, 8], weight: f32[8]):
        add_0: f32[T, 8] = add(a, b)
        rms_norm_0: f32[T, 8] = rms_norm(add_0, weight, eps=1e-06)
        return {"out0": add_0, "out1": rms_norm_0}
    def gated_33be(x: f32[T, 16]):
        slice_0: f32[T, 8] = slice(x, dim=1, start=0, step=1, stop=8)
        slice_1: f32[T, 8] = slice(x, dim=1, start=8, step=1, stop=16)
        gated_0: f32[T, 8] = gated(slice_0, slice_1, activation="silu")
        return {"out0": gated_0}
    def add_7e4f(a: f32[T, 8], b: f32[T, 8]):
        add_0: f32[T, 8] = add(a, b)
        return {"out0": add_0}
    fused_0: (f32[T, 8], f32[T, 8],) = fused(x, y, w, body=add_rms_norm_e1a5, kind="reduction")
    item_0: f32[T, 8] = item(fused_0, index=0)
    item_1: f32[T, 8] = item(fused_0, index=1)
    linear_0: f32[T, 16] = linear(item_1, up)
    fused_1: f32[T, 8] = fused(linear_0, body=gated_33be, kind="elementwise", roles=("epilogue", "prologue"))
    linear_1: f32[T, 8] = linear(fused_1, down)
    fused_2: f32[T, 8] = fused(item_0, linear_1, body=add_7e4f, kind="elementwise", roles=("epilogue",))
    return {"out0": fused_2}
"""  # noqa: E501  (the text of one call is one line)


@pytest.mark.quick
def test_a_residual_mlp_is_three_calls_beside_its_matmuls():
    check(fuse, MLP, MLP_FUSED, SIZES)


SOFTMAX = """
def g(x: f32[T, 8], scale: f32[1, 8]):
    mul_0: f32[T, 8] = mul(x, scale)
    amax_0: f32[T, 1] = amax(mul_0, dims=(1,), keepdim=True)
    sub_0: f32[T, 8] = sub(mul_0, amax_0)
    exp_0: f32[T, 8] = exp(sub_0)
    sum_0: f32[T] = sum(exp_0, dims=(1,), keepdim=False)
    reshape_0: f32[T, 1] = reshape(sum_0, shape=(T, 1))
    expand_0: f32[T, 8] = expand(reshape_0, shape=(T, 8))
    div_0: f32[T, 8] = div(exp_0, expand_0)
    return {"out0": div_0}
"""
SOFTMAX_FUSED = """
def g(x: f32[T, 8], scale: f32[1, 8]):
    def mul_amax_sub_exp_and_2_0d47(a: f32[T, 8], b: f32[1, 8]):
        mul_0: f32[T, 8] = mul(a, b)
        amax_0: f32[T, 1] = amax(mul_0, dims=(1,), keepdim=True)
        sub_0: f32[T, 8] = sub(mul_0, amax_0)
        exp_0: f32[T, 8] = exp(sub_0)
        sum_0: f32[T] = sum(exp_0, dims=(1,), keepdim=False)
        reshape_0: f32[T, 1] = reshape(sum_0, shape=(T, 1))
        expand_0: f32[T, 8] = expand(reshape_0, shape=(T, 8))
        div_0: f32[T, 8] = div(exp_0, expand_0)
        return {"out0": div_0}
    fused_0: f32[T, 8] = fused(x, scale, body=mul_amax_sub_exp_and_2_0d47, kind="reduction")
    return {"out0": fused_0}
"""


@pytest.mark.quick
def test_reductions_over_one_row_are_one_call():
    check(fuse, SOFTMAX, SOFTMAX_FUSED, SIZES)


LOOKUP = """
def g(ids: i64[T], table: f32[9, 8], w: f32[8], wanted: i64[R]):
    embedding_0: f32[T, 8] = embedding(table, ids)
    rms_norm_0: f32[T, 8] = rms_norm(embedding_0, w, eps=1e-05)
    mul_0: f32[T, 8] = mul(embedding_0, rms_norm_0)
    index_select_0: f32[R, 8] = index_select(mul_0, wanted, dim=0)
    rms_norm_1: f32[R, 8] = rms_norm(index_select_0, w, eps=1e-05)
    return {"out0": rms_norm_1}
"""
LOOKUP_FUSED = """
def g(ids: i64[T], table: f32[9, 8], w: f32[8], wanted: i64[R]):
    def embedding_rms_norm_mul_4e84(weight: f32[9, 8], ids: i64[T], weight_1: f32[8]):
        embedding_0: f32[T, 8] = embedding(weight, ids)
        rms_norm_0: f32[T, 8] = rms_norm(embedding_0, weight_1, eps=1e-05)
        mul_0: f32[T, 8] = mul(embedding_0, rms_norm_0)
        return {"out0": mul_0}
    def index_select_rms_norm_2d20(x: f32[T, 8], index: i64[R], weight: f32[8]):
        index_select_0: f32[R, 8] = index_select(x, index, dim=0)
        rms_norm_0: f32[R, 8] = rms_norm(index_select_0, weight, eps=1e-05)
        return {"out0": rms_norm_0}
    fused_0: f32[T, 8] = fused(table, ids, w, body=embedding_rms_norm_mul_4e84, kind="reduction")
    fused_1: f32[R, 8] = fused(fused_0, wanted, w, body=index_select_rms_norm_2d20, kind="reduction")
    return {"out0": fused_1}
"""  # noqa: E501


def test_rows_picked_by_an_index_are_loads_and_split_groups():
    check(fuse, LOOKUP, LOOKUP_FUSED, SIZES)


BRANCHES = """
def g(p: bool[()], x: f32[T, 8]):
    def yes(a: f32[T, 8]):
        exp_0: f32[T, 8] = exp(a)
        neg_0: f32[T, 8] = neg(exp_0)
        return {"y": neg_0}
    def no(a: f32[T, 8]):
        return {"y": a}
    cond_0: f32[T, 8] = cond(p, x, otherwise=no, then=yes)
    return {"out0": cond_0}
"""
BRANCHES_FUSED = """
def g(p: bool[()], x: f32[T, 8]):
    def no(a: f32[T, 8]):
        return {"y": a}
    def yes(a: f32[T, 8]):
        def exp_neg_8e50(x: f32[T, 8]):
            exp_0: f32[T, 8] = exp(x)
            neg_0: f32[T, 8] = neg(exp_0)
            return {"out0": neg_0}
        fused_0: f32[T, 8] = fused(a, body=exp_neg_8e50, kind="elementwise")
        return {"y": fused_0}
    cond_0: f32[T, 8] = cond(p, x, otherwise=no, then=yes)
    return {"out0": cond_0}
"""


def test_branches_are_fused_too():
    check(fuse, BRANCHES, BRANCHES_FUSED, SIZES)


def test_layers_share_one_body():
    layer = """
    add_{i}: f32[T, 8] = add({x}, x)
    rms_norm_{i}: f32[T, 8] = rms_norm(add_{i}, w{i}, eps=1e-06)
    linear_{i}: f32[T, 8] = linear(rms_norm_{i}, up)
"""
    names = ["x", "linear_0", "linear_1"]
    text = "".join(layer.format(i=i, x=name) for i, name in enumerate(names))
    head = "def g(x: f32[T, 8], w0: f32[8], w1: f32[8], w2: f32[8], up: f32[8, 8]):"
    graph = fuse(parse(f'{head}{text}    return {{"y": linear_2}}\n'))
    bodies = [node.attr("body") for node in graph.nodes if node.op == "fused"]
    # x + x is one operand; from then on the layers are alike.
    assert len(bodies) == 3 and bodies[1] is bodies[2] and bodies[0] is not bodies[1]


def test_colliding_hashes_grow(monkeypatch: pytest.MonkeyPatch):
    digests = iter(("12345678aaaa", "12345678bbbb", "1234ffff0000"))
    monkeypatch.setattr("tilewright.passes.fuse_body._digest", lambda body: next(digests))
    graph = fuse(
        parse("""
def g(x: f32[T, 8], y: f32[R, 8], z: f32[S, 8]):
    a: f32[T, 8] = exp(x)
    b: f32[R, 8] = exp(y)
    c: f32[S, 8] = exp(z)
    return {"a": a, "b": b, "c": c}
""")
    )
    assert body_names(graph) == ["exp_1234", "exp_12345678", "exp_1234ffff"]


def test_a_body_that_is_there_already_is_taken():
    text = """
def g(x: f32[T, 8], w: f32[8, 8]):
    a: f32[T, 8] = exp(x)
    b: f32[T, 8] = linear(a, w)
    return {"b": b}
"""
    (x, w), graph = parse(text).inputs, fuse(parse(text))
    later = make("exp", make("linear", make("linear", graph.outputs[0], w), w))
    again = fuse(graph.with_outputs((later,)))
    assert len(body_names(again)) == 2 and len(set(body_names(again))) == 1
    assert x in again.inputs


def test_a_value_used_across_a_matmul_is_not_fused_with_its_later_use():
    assert fused_stems("""
def g(x: f32[T, 8], w: f32[8, 8]):
    a: f32[T, 8] = exp(x)
    b: f32[T, 8] = linear(a, w)
    c: f32[T, 8] = mul(a, b)
    return {"y": c}
""") == ["exp", "mul"]


def test_groups_that_would_wait_for_one_another_stay_apart():
    # {a, d} and {b, c, e} are convex each, but a is before b, and c before d.
    stems = fused_stems("""
def g(x: f32[T, 8], y: f32[T, 4]):
    a: f32[T, 8] = exp(x)
    c: f32[T, 4] = sin(y)
    a4: f32[T, 4] = slice(a, dim=1, start=0, stop=4)
    b: f32[T, 4] = cos(a4)
    e: f32[T, 4] = add(b, c)
    c8: f32[T, 8] = pad(c, pads=((0, 0), (0, 4)), value=0.0)
    d: f32[T, 8] = mul(a, c8)
    return {"d": d, "e": e}
""")
    assert stems == ["sin", "exp_mul", "cos_add"]


def test_other_row_counts_are_another_group():
    assert fused_stems("""
def g(x: f32[T, 8], y: f32[R, 8]):
    a: f32[T, 8] = exp(x)
    b: f32[R, 8] = exp(y)
    s: f32[8] = sum(a, dims=(0,), keepdim=False)
    c: f32[R, 8] = mul(b, s)
    return {"y": c}
""") == ["exp", "exp_mul"]


def test_reductions_over_other_axes_are_no_members():
    stems = fused_stems("""
def g(x: f32[T, 8]):
    a: f32[T, 8] = exp(x)
    m: f32[T, 1] = mean(a, dims=(1,), keepdim=True)
    b: f32[T, 8] = sub(a, m)
    n: f32[1, 8] = amax(b, dims=(0,), keepdim=True)
    c: f32[T, 8] = sub(b, n)
    return {"y": c}
""")
    assert stems == ["exp_mean_sub", "sub"]


def test_other_widths_are_another_group():
    assert fused_stems("""
def g(x: f32[T, 8]):
    a: f32[T, 8] = exp(x)
    h: f32[T, 4] = slice(a, dim=1, start=2, stop=6)
    b: f32[T, 4] = softmax(h, dim=1)
    return {"y": b}
""") == ["exp", "softmax"]


def test_a_member_reads_no_other_index_of_its_own_group():
    assert fused_stems("""
def g(x: f32[T, 8]):
    a: f32[T, 8] = exp(x)
    first: f32[T, 1] = slice(a, dim=1, start=0, stop=1)
    b: f32[T, 8] = mul(a, first)
    return {"y": b}
""") == ["exp", "mul"]


def test_columns_of_a_square_are_not_taken_for_rows():
    # With T = 8 rows of width 8 only the axis tells a row's sum from a column's factor.
    assert fused_stems("""
def g(x: f32[8, 8]):
    a: f32[8] = sum(x, dims=(1,), keepdim=False)
    b: f32[8, 8] = mul(x, a)
    return {"y": b}
""") == ["sum", "mul"]


def test_a_norm_whose_weight_is_computed_in_rows_waits_for_it():
    assert fused_stems("""
def g(x: f32[8], y: f32[8]):
    w: f32[8] = exp(y)
    b: f32[8] = rms_norm(x, w, eps=1e-06)
    return {"y": b}
""") == ["exp", "rms_norm"]


def test_two_members_used_outside_are_two_results():
    graph = fuse(
        parse("""
def g(x: f32[T, 8], w: f32[8, 8]):
    a: f32[T, 8] = exp(x)
    b: f32[T, 8] = neg(a)
    c: f32[T, 8] = linear(b, w)
    return {"a": a, "c": c}
""")
    )
    (node,) = (n for n in graph.nodes if n.op == "fused")
    assert len(node.types) == 2 and [o.op for o in body_of(node).outputs] == ["exp", "neg"]


def test_operands_are_limited():
    count = MAX_OPERANDS + 3
    inputs = ", ".join(f"x{i}: f32[T, 8]" for i in range(count))
    lines = "".join(
        f"    a{i}: f32[T, 8] = add({f'a{i - 1}' if i > 1 else 'x0'}, x{i})\n"
        for i in range(1, count)
    )
    text = f'def g({inputs}):\n{lines}    return {{"y": a{count - 1}}}\n'
    assert len(fused_stems(text)) == 2
    graph = fuse(parse(text))
    assert max(len(n.operands) for n in graph.nodes if n.op == "fused") == MAX_OPERANDS


def test_what_a_body_could_not_be_called_with_stays_as_it_is():
    text = """
def g(x: f32[T, S, 8]):
    reshape_0: f32[S*T, 8] = reshape(x, shape=(S*T, 8))
    exp_0: f32[S*T, 8] = exp(reshape_0)
    return {"out0": exp_0}
"""
    check(fuse, text, None, SIZES)


@pytest.mark.parametrize(
    "line",
    [
        "a: f32[T, 8] = matmul(x, w)",
        "a: f32[T, 8] = flip(x, dims=(1,))",
        "a: f32[T, 8] = cumsum(x, dim=1)",
        "a: f32[T, 8] = softmax(x, dim=0)",
        "a: f32[8, T] = permute(x, dims=(1, 0))",
        "a: f32[T, 8] = slice(x, dim=1, start=0, stop=8)",
        "a: f32[T, 3] = index_select(x, i, dim=1)",
    ],
)
def test_no_members(line: str):
    head = "def g(x: f32[T, 8], w: f32[8, 8], i: i64[3]):"
    graph = parse(f'{head}\n    {line}\n    return {{"out0": a}}\n')
    assert fuse(graph) == graph


def test_a_fused_call_moves_what_its_body_loads():
    (node,) = (
        n
        for n in fuse(
            parse("""
def g(ids: i64[T], table: f32[1000, 8], gates: f32[T, 24]):
    a: f32[T, 8] = embedding(table, ids)
    b: f32[T, 8] = slice(gates, dim=1, start=8, stop=16)
    c: f32[T, 8] = mul(a, b)
    return {"y": c}
""")
        ).nodes
        if n.op == "fused"
    )
    # Eight bytes an index; a row of the table, a row of the slice, a row of the result.
    assert evaluate(schema("fused").cost(node).bytes, {"T": 10}) == 10 * (8 + 3 * 8 * 4)
    assert evaluate(schema("fused").cost(node).flops, {"T": 10}) == 10 * 8

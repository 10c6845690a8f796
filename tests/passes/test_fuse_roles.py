"""Roles of fused groups around products, each beside the nearest case that has none."""

from __future__ import annotations

import pytest

from rewriting import parse
from tilewright.ir.ops.control import body_of
from tilewright.passes.fuse import fuse

HEAD = """
def g(x: f32[T, 8], w: f32[8, 8], v: f32[8, 8], wide: f32[16, 8], n: f32[8], i: i64[T]):
    p: f32[T, 8] = linear(x, w)
"""


def roles(lines: str) -> dict[str, object]:
    """Roles by what the fused node does, for ``lines`` after the product p; z is the result."""
    text = "".join(f"    {line.strip()}\n" for line in lines.strip().splitlines())
    graph = fuse(parse(f'{HEAD}{text}    return {{"y": z}}\n'))
    found = [node for node in graph.nodes if node.op == "fused"]
    return {body_of(n).name.rsplit("_", 1)[0]: n.attr("roles") for n in found}


@pytest.mark.quick
def test_an_activation_between_two_products_is_both():
    found = roles("""
        a: f32[T, 8] = silu(p)
        z: f32[T, 8] = linear(a, v)
    """)
    assert found == {"silu": ("epilogue", "prologue")}


def test_a_residual_is_an_epilogue():
    assert roles("z: f32[T, 8] = add(x, p)") == {"add": ("epilogue",)}


def test_a_gate_over_the_halves_of_one_product_is_an_epilogue():
    found = roles("""
        q: f32[T, 16] = linear(p, wide)
        gate: f32[T, 8] = slice(q, dim=1, start=0, stop=8)
        up: f32[T, 8] = slice(q, dim=1, start=8, stop=16)
        z: f32[T, 8] = gated(gate, up, activation="silu")
    """)
    assert found == {"gated": ("epilogue",)}


def test_what_runs_along_the_rows_of_a_product_is_no_epilogue():
    assert roles("z: f32[T, 8] = softmax(p, dim=1)") == {"softmax": None}


def test_what_reads_other_rows_of_a_product_is_no_epilogue():
    found = roles("""
        a: f32[T, 8] = index_select(p, i, dim=0)
        z: f32[T, 8] = neg(a)
    """)
    assert found == {"index_select_neg": None}


def test_a_product_that_others_read_has_no_epilogue():
    found = roles("""
        a: f32[T, 8] = neg(p)
        b: f32[T, 8] = flip(p, dims=(1,))
        z: f32[T, 16] = concat(a, b, dim=1)
    """)
    assert found == {"neg": None}


def test_a_group_of_two_products_is_the_epilogue_of_neither():
    found = roles("""
        q: f32[T, 8] = linear(x, v)
        z: f32[T, 8] = mul(p, q)
    """)
    assert found == {"mul": None}


def test_a_norm_before_products_is_a_prologue():
    found = roles("""
        a: f32[T, 8] = rms_norm(x, n, eps=1e-06)
        b: f32[T, 8] = linear(a, v)
        c: f32[T, 16] = linear(a, wide)
        z: f32[T, 24] = concat(b, c, dim=1)
    """)
    assert found == {"rms_norm": ("prologue",)}


def test_a_group_with_two_results_is_no_prologue():
    found = roles("""
        a: f32[T, 8] = add(x, p)
        b: f32[T, 8] = rms_norm(a, n, eps=1e-06)
        c: f32[T, 8] = linear(b, v)
        z: f32[T, 8] = add(a, c)
    """)
    assert found == {"add_rms_norm": None, "add": ("epilogue",)}


def test_a_value_that_is_read_otherwise_too_is_no_prologue():
    found = roles("""
        a: f32[T, 8] = neg(x)
        b: f32[T, 8] = linear(a, v)
        c: f32[T, 8] = flip(a, dims=(1,))
        z: f32[T, 16] = concat(b, c, dim=1)
    """)
    assert found == {"neg": None}


def test_a_weight_that_is_computed_is_no_prologue():
    found = roles("""
        a: f32[8, 8] = exp(v)
        z: f32[T, 8] = linear(x, a)
    """)
    assert found == {"exp": None}


def test_an_output_is_no_prologue():
    graph = fuse(
        parse("""
def g(x: f32[T, 8], w: f32[8, 8]):
    a: f32[T, 8] = silu(x)
    b: f32[T, 8] = linear(a, w)
    return {"a": a, "b": b}
""")
    )
    (node,) = (n for n in graph.nodes if n.op == "fused")
    assert node.attr("roles") is None

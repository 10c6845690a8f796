"""Kernels that move elements, against the ops' references, in poisoned memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.triton.layout import Layout, dense, located
from tilewright.codegen.triton.moves import emit_copy, emit_kv_write, emit_rope
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.ops.cache import write_rows
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from triton_bodies import H100, drawn, guarded, placed, run
from triton_running import compile_for

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
T = symbol("T")


def given_node(name: str, dtype: DType, *shape) -> Node:
    return input_node(name, TensorType(dtype, shape))


def moved(emit, node, values, spots, sizes):
    """The first result of a node's kernel, with its operands at ``spots``."""
    pairs = [
        placed(value, operand.type, **spot)
        for value, operand, spot in zip(values, node.operands, spots, strict=True)
    ]
    source = emit(node, tuple(layout for _, layout in pairs), H100)
    assert source is not None
    return run(source, node, [buffer for buffer, _ in pairs], sizes)[0]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F64], ids=str)
@settings(max_examples=8)
@given(st.data())
def test_rope(layout, dtype, data):
    width = data.draw(st.sampled_from([4, 16, 20, 128]))
    half = data.draw(st.sampled_from([n for n in (1, 2, 6, 8, 64) if 2 * n <= width]))
    lead = data.draw(st.sampled_from([(T, 3), (2, T, 4), (T,), (1, T, 2)]))
    angles = data.draw(st.sampled_from([(*lead[:-1], 1), (1,) * len(lead), lead]))
    tokens = {"T": data.draw(st.sampled_from([1, 2, 7]))}
    float_type = data.draw(st.sampled_from([dtype, DType.F32]))
    x = given_node("x", dtype, *lead, width)
    cos, sin = (given_node(name, float_type, *angles, half) for name in ("c", "s"))
    stepwise = True if float_type is dtype and data.draw(st.booleans()) else None
    node = make("rope", x, cos, sin, layout=layout, stepwise=stepwise)
    values = [drawn(operand.type, tokens) for operand in node.operands]
    spots = [{"pads": (data.draw(st.integers(0, 9)), 3)}, {}, {"pads": (1, 0)}]
    found = moved(emit_rope, node, values, spots, tokens)
    wanted = schema("rope").reference(*values, layout=layout, stepwise=stepwise)
    if stepwise and dtype is DType.BF16:
        assert same(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_rope_of_8_bit_floats_is_declined():
    x = given_node("x", DType.F8E4M3, T, 2, 8)
    angle = given_node("c", DType.F32, T, 1, 4)
    node = make("rope", x, angle, angle)
    assert emit_rope(node, tuple(dense(o.shape) for o in node.operands), H100) is None


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F8E4M3, DType.F8E5M2], ids=str)
@pytest.mark.parametrize("index", [DType.I64, DType.I32], ids=str)
def test_rows_go_to_their_slots_and_nowhere_else(dtype, index):
    pages = symbol("N")
    cache, new = given_node("cache", dtype, pages, 4, 2, 6), given_node("new", dtype, T, 2, 6)
    node = make("kv_write", cache, new, given_node("slots", index, T))
    sizes = {"T": 7, "N": 3}
    slots = torch.tensor([3, -1, 11, 12, 0, 2**31 - 1, -(2**31)]).to(index.torch)
    old, rows = (
        torch.randn(shape).to(dtype.torch).view(shape) for shape in ((3, 4, 2, 6), (7, 2, 6))
    )
    buffer = guarded(old.shape, dtype.torch)
    buffer.copy_(old)
    (spread, layout), kept = placed(rows, new.type, pads=(5, 3)), (slots >= 0) & (slots < 12)
    source = emit_kv_write(node, (dense(cache.shape), layout, dense((T,))), H100)
    assert source is not None
    (found,) = run(source, node, [buffer, spread, slots], sizes)
    assert found.data_ptr() == buffer.data_ptr()
    assert same(found, write_rows(old.clone(), rows[kept], slots[kept]))


def test_a_cache_with_uneven_slots_is_declined():
    cache, new = given_node("cache", DType.F32, 3, 4, 2, 6), given_node("new", DType.F32, T, 2, 6)
    node = make("kv_write", cache, new, given_node("slots", DType.I64, T))
    uneven = Layout(0, (100, 12, 6, 1))
    assert emit_kv_write(node, (uneven, dense(new.shape), dense((T,))), H100) is None


MOVED = {
    "permute": lambda x: make("permute", x, dims=(2, 0, 1)),
    "swap": lambda x: make("permute", x, dims=(0, 2, 1)),
    "slice": lambda x: make("slice", x, dim=1, start=1, step=2, stop=4),
    "slice of tokens": lambda x: make("slice", x, dim=0, start=T - 1, step=1, stop=T),
    "expand": lambda x: make("expand", x, shape=(3, T, 4, 10)),
    "reshape": lambda x: make("reshape", x, shape=(T, 40)),
    "reshape that mixes": lambda x: make("reshape", x, shape=(2 * T, 20)),
}


@pytest.mark.parametrize("dtype", [DType.BF16, DType.I64, DType.BOOL, DType.F8E5M2], ids=str)
@pytest.mark.parametrize("case", MOVED)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)], ids=str)
def test_views_made_dense(case, dtype, order):
    node = MOVED[case](given_node("x", dtype, T, 4, 10))
    value = torch.randint(0, 2, (5, 4, 10)).to(dtype.torch)
    spots = [{"order": order, "pads": (2, 1)}]
    found = moved(emit_copy, node, [value], spots, {"T": 5})
    attrs = {name: v for name, v in node.attrs}
    if case == "slice of tokens":
        attrs |= {"start": 4, "stop": 5}
    if "shape" in attrs:
        attrs["shape"] = tuple(found.shape)
    assert same(found, schema(node.op).reference(value, **attrs))


def test_a_scalar_is_copied_too():
    node = make("reshape", given_node("x", DType.F32, 1, 1), shape=())
    assert moved(emit_copy, node, [torch.full((1, 1), 3.5)], [{}], {}).item() == 3.5


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_concat(dim):
    shapes = [[T, 4, 10] for _ in range(3)]
    shapes[1][dim], shapes[2][dim] = 3, 1
    parts = [given_node(f"x{i}", DType.BF16, *shape) for i, shape in enumerate(shapes)]
    node = make("concat", *parts, dim=dim)
    values = [drawn(part.type, {"T": 5}) for part in parts]
    spots = [{}, {"pads": (1, 2)}, {"order": (1, 0, 2)}]
    found = moved(emit_copy, node, values, spots, {"T": 5})
    assert same(found, torch.cat(values, dim))


def test_complex_numbers_are_not_copied():
    node = make("permute", given_node("x", DType.C64, T, 4), dims=(1, 0))
    assert emit_copy(node, (dense((T, 4)),), H100) is None


def test_a_view_of_a_view_is_one_copy():
    x = given_node("x", DType.F32, T, 4, 6)
    permuted = make("permute", x, dims=(1, 0, 2))
    node = make("reshape", permuted, shape=(24 * T,))
    base, layout = located(permuted)
    source = emit_copy(node, (layout,), H100)
    value = torch.randn(3, 4, 6)
    assert base is x and source is not None
    (found,) = run(source, node, [value], {"T": 3})
    assert torch.equal(found, value.permute(1, 0, 2).reshape(-1))


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_moves_compile(arch):
    x, angle = given_node("x", DType.BF16, T, 32, 128), given_node("c", DType.BF16, T, 1, 64)
    rope = make("rope", x, angle, angle)
    cache = given_node("cache", DType.F8E4M3, symbol("N"), 16, 8, 128)
    new = given_node("new", DType.F8E4M3, T, 8, 128)
    write = make("kv_write", cache, new, given_node("slots", DType.I64, T))
    for emit, node in ((emit_rope, rope), (emit_kv_write, write)):
        source = emit(node, tuple(dense(o.shape) for o in node.operands), H100)
        assert source is not None
        assert all(found.spills == 0 for found in compile_for(source, arch))

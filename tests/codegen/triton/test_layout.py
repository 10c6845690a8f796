"""Layouts of views against the strides that torch gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.triton.layout import Layout, dense, is_dense, located
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import evaluate, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType

pytestmark = pytest.mark.quick
T = symbol("T")


def _x(*shape) -> Node:
    return input_node("x", TensorType(DType.F32, shape))


@st.composite
def view_chains(draw: st.DrawFn) -> Node:
    """Up to five views of one another over a small tensor."""
    node = _x(*draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    for _ in range(draw(st.integers(1, 5))):
        node = _view(draw, node)
    return node


def _view(draw: st.DrawFn, x: Node) -> Node:
    shape = x.shape
    kind = draw(st.sampled_from(["slice", "permute", "expand", "reshape"]))
    if kind == "permute":
        return make("permute", x, dims=tuple(draw(st.permutations(range(len(shape))))))
    if kind == "expand":
        grown = tuple(draw(st.sampled_from([s, 3])) if s == 1 else s for s in shape)
        return make("expand", x, shape=(*draw(st.sampled_from([(), (2,)])), *grown))
    if kind == "slice":
        dim = draw(st.integers(0, len(shape) - 1))
        start = draw(st.integers(0, shape[dim] - 1))
        stop = draw(st.integers(start + 1, shape[dim]))
        return make("slice", x, dim=dim, start=start, stop=stop, step=draw(st.integers(1, 2)))
    count = math.prod(shape)
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    first = draw(st.sampled_from(divisors))
    rest = count // first
    second = draw(st.sampled_from([d for d in divisors if rest % d == 0]))
    return make("reshape", x, shape=(first, second, rest // second))


@given(view_chains())
def test_a_chain_of_views_reads_what_torch_reads(node: Node) -> None:
    chain = [node]
    while chain[-1].op != "input":
        chain.append(chain[-1].operands[0])
    values = {chain[-1]: torch.arange(math.prod(chain[-1].shape)).view(chain[-1].shape)}
    for each in reversed(chain[:-1]):
        values[each] = schema(each.op).reference(values[each.operands[0]], **dict(each.attrs))
    base, layout = located(node)
    found = torch.as_strided(values[base].contiguous(), node.shape, layout.strides, layout.offset)
    assert torch.equal(found, values[node])


def test_heads_of_a_merged_projection_lie_in_its_rows() -> None:
    qkv = _x(T, 128)
    k = make("slice", qkv, dim=1, start=64, stop=96, step=1)
    base, layout = located(make("reshape", k, shape=(T, 2, 16)))
    assert base is qkv and layout == Layout(64, (128, 16, 1))


def test_a_reshape_across_a_permutation_is_a_buffer_of_its_own() -> None:
    moved = make("permute", _x(T, 4, 16), dims=(1, 0, 2))
    merged = make("reshape", moved, shape=(4 * T, 16))
    base, layout = located(merged)
    assert base is merged and is_dense(layout, merged.shape)


def test_symbolic_strides_are_expressions() -> None:
    base, layout = located(make("permute", _x(2, T, 8), dims=(1, 0, 2)))
    assert [evaluate(s, {"T": 5}) for s in layout.strides] == [8, 40, 1]
    assert not is_dense(layout, (T, 2, 8)) and is_dense(dense((T, 1, 8)), (T, 1, 8))

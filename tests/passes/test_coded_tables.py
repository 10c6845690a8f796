"""Tables in codes: the rows that an embedding picks are those of the table in numbers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.formats.stored_codes import StoredCodes
from tilewright.formats.weights import Held, Weight
from tilewright.ir.build import input_node, make, param
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.types import TensorType
from tilewright.passes.keep_codes import keep_codes

VOCABULARY = 7


def _table(weight: Weight, tied: bool = False) -> Graph:
    """Rows picked from a table, and with ``tied`` their products with all of its rows."""
    ids = input_node("ids", TensorType(DType.I64, (symbol("T"),)))
    table = param("w", TensorType(DType.F32, tuple(weight.shape)))
    rows = make("embedding", table, ids)
    return Graph("g", (ids,), (make("linear", rows, table) if tied else rows,), {"w": weight})


def _codes(four: bool, zero: bool, groups: int, group: int, seed: int) -> StoredCodes:
    g = torch.Generator().manual_seed(seed)
    shape, spans = (VOCABULARY, groups * (group or 32)), (VOCABULARY, groups)
    low, high, dtype = (0, 16, torch.uint8) if four else (-128, 128, torch.int8)
    codes = torch.randint(low, high, shape, generator=g, dtype=dtype)
    scale = torch.rand(spans, generator=g).half()
    zeros = Held(torch.randn(spans, generator=g), "zero") if zero else None
    return StoredCodes(Held(codes, "codes"), Held(scale, "scale"), zeros, group=group)


@settings(max_examples=20, deadline=None)
@given(
    four=st.booleans(),
    zero=st.booleans(),
    groups=st.integers(1, 3),
    group=st.sampled_from([16, 32]),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_are_those_of_the_numbers(
    four: bool, zero: bool, groups: int, group: int, tied: bool, seed: int
) -> None:
    graph = _table(_codes(four, zero, groups, group, seed).weight(), tied)
    kept = keep_codes(graph)
    assert "w" not in kept.weights
    ids = [torch.tensor([3, 0, 6, 3])]
    (wanted,), (found,) = interpret(graph, ids), interpret(kept, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_groups_that_do_not_divide_a_row_are_left() -> None:
    codes = Held(torch.zeros(VOCABULARY, 48, dtype=torch.int8), "codes")
    scale = Held(torch.ones(VOCABULARY, 2), "scale")
    graph = _table(StoredCodes(codes, scale, group=32).weight())
    assert keep_codes(graph) is graph


def test_numbers_are_left() -> None:
    graph = _table(Held(torch.randn(VOCABULARY, 32), "w"))
    assert keep_codes(graph) is graph


def test_tables_whose_products_round_are_left() -> None:
    codes = Held(torch.zeros(VOCABULARY, 32, dtype=torch.int8), "codes")
    stored = StoredCodes(codes, Held(torch.ones(VOCABULARY, 1), "scale"), rounds=torch.int8)
    graph = _table(stored.weight())
    assert keep_codes(graph) is graph

"""``paged_attention`` without ``query_start``: one token a sequence."""

from __future__ import annotations

import pytest
import torch

from tilewright.errors import GraphError
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.parser import parse_graph
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType

B, M, N = map(symbol, "BMN")
REFERENCE = schema("paged_attention").reference


def tensor(name, *shape, dtype=DType.F32):
    return input_node(name, TensorType(dtype, shape))


def call(rows=B, tables=B, sinks=False, integers=DType.I32):
    cache = (N, 4, 2, 8)
    return make(
        "paged_attention",
        tensor("q", rows, 4, 8),
        tensor("k", *cache),
        tensor("v", *cache),
        tensor("tables", tables, M, dtype=DType.I32),
        tensor("lens", B, dtype=integers),
        None,
        tensor("sinks", 4) if sinks else None,
        scale=0.3,
    )


def test_it_is_the_general_form_with_a_start_a_row():
    q, k, v = (torch.randn(s).double() for s in ((3, 4, 8), (5, 4, 2, 8), (5, 4, 2, 8)))
    tables = torch.tensor([[3, 1], [2, 0], [4, 0]], dtype=torch.int32)
    lens, starts = torch.tensor([7, 2, 4]), torch.arange(4)
    sinks = torch.randn(4).double()
    for extra in ((), (sinks,)):
        found = REFERENCE(q, k, v, tables, lens, None, *extra, scale=0.3, window=5)
        wanted = REFERENCE(q, k, v, tables, lens, starts, *extra, scale=0.3, window=5)
        assert torch.equal(found, wanted)


def test_a_sequence_without_tokens_gives_zero():
    q, cache = torch.randn(2, 4, 8), torch.randn(5, 4, 2, 8)
    tables = torch.tensor([[3, 1], [9999, -1]])
    found = REFERENCE(q, cache, cache, tables, torch.tensor([7, 0]), scale=0.3)
    assert found[0].all() and not found[1].any()


def test_its_type_is_that_of_q_with_the_width_of_v():
    assert call().type == TensorType(DType.F32, (B, 4, 8))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"rows": symbol("T")}, "a row of q for each"),
        ({"rows": B + 1}, "a row of q for each"),
        ({"tables": B + 1}, r"integers \[B, M\]"),
        ({"integers": DType.F32}, r"integers \[B, M\]"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, said):
    with pytest.raises(GraphError, match=said):
        call(**wrong)


def test_its_text_parses_back():
    node = call(sinks=True)
    graph = Graph("g", tuple(a for a in node.args if a is not None), (node,))
    text = str(graph)
    assert "None" in text and str(parse_graph(text)) == text

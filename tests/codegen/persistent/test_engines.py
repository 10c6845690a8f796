"""The decode graph that an engine really has: read, computed and compiled whole."""

from __future__ import annotations

from functools import cache

from tilewright.codegen.base import get_backend
from tilewright.codegen.persistent.reading import Attention, Begin, Product, read_decode
from tilewright.compiler.graphs import pass_graphs
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.compiler.lowering import lower
from tilewright.ir.graph import Graph
from tiny_models import tiny_model

PAGE = 4


def decode_graph(family: str) -> Graph:
    """The decode graph of a tiny model in bfloat16, as an engine on Triton has it."""
    graph = lower(capture_causal_lm(tiny_model(family).bfloat16()), family)
    passed = pass_graphs(graph, "paged", get_backend("triton"), "off", None, PAGE)
    assert passed.decode is not None
    return passed.decode


llama = cache(lambda: read_decode(decode_graph("llama")))


def test_all_calls_of_a_llama_are_read() -> None:
    shape = llama()
    kinds = [type(shape.form(step)) for step in shape.calls]
    layer = [Product, Attention, Product, Product, Product]
    assert kinds == [Begin, *layer, *layer, Product]
    assert shape.form(shape.calls[-1]) == Product(160, 64, True, 1e-6, chosen=True)
    assert (shape.width, shape.head_dim) == (64, 16)

"""Weights as expressions: what a pass may build upon, and what it may not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from rewriting import parse
from tilewright.errors import GraphError
from tilewright.passes.expressions import expression_of, expressions

GRAPH = """
def g(x: f32[T, 4]):
    a: f32[3, 4] = param("a")
    b: f32[3] = param("b")
    y: f32[T, 3] = linear(x, a, b)
    return {"y": y}
"""


@dataclass(frozen=True)
class Elsewhere:
    """A weight that can be loaded, and no more."""

    shape = (3,)
    dtype = torch.float32

    def load(self) -> torch.Tensor:
        return torch.zeros(3)


@pytest.mark.quick
def test_what_is_an_expression_is_given_and_the_rest_refused() -> None:
    graph = parse(GRAPH)
    assert expressions(graph) == dict(graph.weights)
    assert list(expressions(graph, ["b"])) == ["b"]
    other = graph.with_weights({"b": Elsewhere()})
    assert expression_of(other, "a") is graph.weights["a"]
    with pytest.raises(GraphError, match="'b'.*Elsewhere.*Held"):
        expressions(other)

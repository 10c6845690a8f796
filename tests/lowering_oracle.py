"""The oracle of the lowering tests: the module itself, run by torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tilewright.compiler.capture import capture_module
from tilewright.compiler.lowering import foreign_ops, lower
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.parser import parse_graph
from tilewright.ir.printer import print_graph


class Function(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


def lowered(
    module: nn.Module | Callable[..., object], inputs: Sequence[Tensor], dynamic: object = None
) -> Graph:
    """The graph of a module or function, whose text reads back to the same graph."""
    module = module if isinstance(module, nn.Module) else Function(module)
    shapes = {"inputs": dynamic} if isinstance(module, Function) and dynamic else dynamic
    graph = lower(capture_module(module, tuple(inputs), shapes), "graph")
    assert parse_graph(print_graph(graph), graph.weights) == graph
    return graph


def assert_same(
    module: nn.Module | Callable[..., object],
    *inputs: Tensor,
    dynamic: object = None,
    others: Sequence[Sequence[Tensor]] = (),
    foreign: Sequence[str] = (),
    tolerance: float = 1e-6,
) -> Graph:
    """Holds the interpreted graph against torch: values, shapes and element types.

    Args:
        module: what is captured on `inputs`.
        dynamic: dynamic shapes, one entry an input.
        others: further inputs, of other sizes, for the same graph.
        foreign: the only ops that may stay aten nodes; each must.
    """
    graph = lowered(module, inputs, dynamic)
    assert set(foreign_ops(graph)) == set(foreign)
    for given in (inputs, *others):
        with torch.no_grad():
            wanted = [x for x in pytree.tree_leaves(module(*given)) if x is not None]
        found = interpret(graph, list(given))
        assert len(found) == len(wanted)
        for got, want in zip(found, wanted, strict=True):
            want = want if isinstance(want, Tensor) else torch.tensor(want)
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    return graph


def ops(graph: Graph) -> list[str]:
    """The ops that compute, in order."""
    return [node.op for node in graph.calls()]

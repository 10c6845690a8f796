"""What is made quicker of torch.export notes and finds what torch does."""

from __future__ import annotations

import linecache

import torch
from torch import fx
from torch._export import utils
from torch.utils._traceback import CapturedTraceback

import quick_export


def test_the_stack_is_torchs_own() -> None:
    def forward(depth: int) -> None:
        if depth:
            forward(depth - 1)
        ours, torchs = quick_export.Stack.extract().summary(), CapturedTraceback.extract().summary()
        assert ours == torchs
        assert ours.format() == torchs.format()

    forward(3)


def test_an_op_that_comes_later_is_found() -> None:
    utils._materialize_cpp_cia_ops()
    with torch.library._scoped_library("tilewright_later", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
        utils._materialize_cpp_cia_ops()
        assert "twice" in torch.ops.tilewright_later.__dict__


def test_equal_graphs_have_one_code_and_each_its_own_constants() -> None:
    class Plus(torch.nn.Module):
        def __init__(self, more: float) -> None:
            super().__init__()
            self.register_buffer("more", torch.tensor(more))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.more

    one, two = (fx.symbolic_trace(Plus(more)) for more in (1.0, 2.0))
    assert one.forward.__code__ is two.forward.__code__
    assert [graph(torch.tensor(3.0)).item() for graph in (one, two)] == [4.0, 5.0]
    place = one.forward.__code__
    assert "x + more" in linecache.getline(place.co_filename, place.co_firstlineno + 2)

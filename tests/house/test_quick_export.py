"""What is made quicker of torch.export notes and finds what torch does."""

from __future__ import annotations

import torch
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

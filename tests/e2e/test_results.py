"""What an engine returns is the caller's: writing to it changes nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tilewright as tw

CPU = {"target": "cpu"}


class Lambda(nn.Module):
    """A module of one function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def compiled(function, *inputs, backend: str = "triton"):
    return tw.compile(Lambda(function), inputs, backend=backend, verify="off", **CPU)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "triton"])
def test_results_share_no_memory_with_inputs_or_one_another(backend: str) -> None:
    x = torch.randn(3, 4)
    kept = x.clone()
    first, second, copy = compiled(lambda x: (x + 1, x + 1, x.clone()), x, backend=backend)(x)
    first.zero_()
    copy.zero_()
    assert torch.equal(second, kept + 1) and torch.equal(x, kept)


@pytest.mark.parametrize(
    "function",
    [lambda x: (x * 2)[:2], lambda x: x[:2], lambda x: (x * 2).chunk(2), lambda x: x.t()],
    ids=["a slice of a value", "a slice of an input", "chunks", "a transpose"],
)
def test_views_are_results_too(function) -> None:
    x = torch.randn(4, 6)
    torch.testing.assert_close(compiled(function, x)(x), function(x))


def test_inputs_that_lie_anywhere_in_memory() -> None:
    engine = compiled(lambda x, y: torch.relu(x.t() @ y), torch.randn(4, 6), torch.randn(4, 6))
    big = torch.randn(12, 6)
    for x, y in ((big[4:8], big[8:]), (torch.randn(6, 4).t(), torch.randn(8, 6)[::2])):
        torch.testing.assert_close(engine(x, y), torch.relu(x.t() @ y))


@pytest.mark.parametrize(
    "function", [lambda x: torch.linalg.qr(x)[0] * 2, lambda x: x.diagonal() * 2]
)
def test_what_torch_answers_in_strides_of_its_own(function) -> None:
    x = torch.randn(5, 5)
    torch.testing.assert_close(compiled(function, x)(x), function(x))

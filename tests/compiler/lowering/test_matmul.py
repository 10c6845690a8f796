"""Matrix products against torch, and which of them are linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowering_oracle import assert_same, lowered, ops

SHAPES = [
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((3,), (3, 4)),
    ((3,), (5, 3, 4)),
    ((2, 3), (3, 4)),
    ((5, 2, 3), (3, 4)),
    ((5, 2, 3), (5, 3, 4)),
    ((2, 1, 2, 3), (5, 3, 4)),
]


def test_matmul() -> None:
    inputs = [torch.randn(shape) for pair in SHAPES for shape in pair]
    assert_same(
        lambda *xs: [a @ b for a, b in zip(xs[::2], xs[1::2], strict=True)], *inputs, tolerance=2e-6
    )


class Weighted(nn.Module):
    """x times a parameter, by one of torch's spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.spelling:
            case "matmul":
                return x @ self.weight
            case "addmm":
                return torch.addmm(self.bias, x, self.weight)
            case "scaled_addmm":
                return torch.addmm(self.bias, x, self.weight, beta=0.5, alpha=2.0)
            case "linear":
                return nn.functional.linear(x, self.weight.T, self.bias)
        return torch.einsum("bk,kn->bn", x, self.weight)


@pytest.mark.quick
@pytest.mark.parametrize("spelling", ["matmul", "addmm", "scaled_addmm", "linear", "einsum"])
def test_products_with_weights_are_linear(spelling: str) -> None:
    graph = assert_same(Weighted(spelling), torch.randn(3, 6), tolerance=2e-6)
    assert {"linear", "matmul"} & set(ops(graph)) == (
        {"matmul"} if spelling == "einsum" else {"linear"}
    )


def test_a_transposed_weight_is_taken_as_it_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    assert ops(assert_same(Tied(), torch.randn(2, 3, 6))) == ["linear"]


def test_products_of_activations_are_matmul() -> None:
    assert ops(lowered(torch.matmul, (torch.randn(2, 3), torch.randn(3, 4)))) == ["matmul"]


def test_batched() -> None:
    assert_same(
        lambda a, b: (
            torch.bmm(a, b),
            torch.baddbmm(torch.ones(5, 2, 4), a, b, beta=0.5, alpha=2.0),
            torch.baddbmm(torch.full((5, 2, 4), torch.nan), a, b, beta=0),
            torch.einsum("bij,bjk->bki", a, b),
            torch.einsum("bij,bjk->ik", a, b),
            torch.outer(a[0, 0], b[0, 0]),
            torch.mv(a[0], b[0, :, 0]),
        ),
        torch.randn(5, 2, 3),
        torch.randn(5, 3, 4),
        tolerance=5e-6,
    )

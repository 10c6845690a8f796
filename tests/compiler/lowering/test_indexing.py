"""Index tensors against torch, negative ones included."""

from __future__ import annotations

import pytest
import torch

from lowering_oracle import assert_same, lowered, ops

INDEXED = {
    "rows": lambda x, i: x[i],
    "columns": lambda x, i: x[:, i],
    "last": lambda x, i: x[..., i],
    "matrix": lambda x, i: x[i[:, None]],
    "pair": lambda x, i: x[i, i],
    "inner_pair": lambda x, i: x[:, i, i[:, None]],
    "triple": lambda x, i: x[i, i, i],
    "constant": lambda x, i: x[:, [0, -1]],
    "index_select": lambda x, i: x.index_select(1, i.abs() % 3),
    "scatter": lambda x, i: x.scatter(2, i.abs().view(1, 1, -1).expand(3, 3, -1), 2.5),
    "scatter_rows": lambda x, i: x.scatter(1, i.abs().view(1, -1, 1).expand(3, -1, 4) % 3, 7),
    "scatter_source": lambda x, i: x.scatter(
        2, i[[0, 2, 4]].view(1, 1, -1).expand(3, 3, -1), -x[..., :3]
    ),
    "one_hot": lambda x, i: torch.nn.functional.one_hot(i.abs(), 5),
    "take_along": lambda x, i: x.gather(2, i.abs().view(1, 1, -1).expand(2, 3, -1)),
}


@pytest.mark.quick
def test_indexing() -> None:
    assert_same(
        lambda x, i: {name: index(x, i) for name, index in INDEXED.items()},
        torch.randn(3, 3, 4),
        torch.tensor([0, -1, 2, -3, 1]),
    )


def test_positions_are_not_wrapped() -> None:
    table = torch.randn(16, 4)
    graph = lowered(lambda x: table[torch.arange(x.shape[0])] + x, (torch.randn(5, 4),))
    assert "where" not in ops(graph) and "index_select" in ops(graph)


def test_complex_rotation_is_real_arithmetic() -> None:
    def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        turn = torch.polar(torch.ones_like(angle), angle)[:, None, :] * 1.5
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * turn).flatten(-2)

    assert_same(rotate, torch.randn(5, 2, 8), torch.randn(5, 4))


def test_other_complex_arithmetic_stays_with_torch() -> None:
    assert_same(
        lambda x: torch.view_as_complex(x).sum(0).abs(),
        torch.randn(3, 2, 2),
        foreign=["aten.complex.default", "aten.abs.default"],
    )


def test_separated_indices_stay_with_torch() -> None:
    index = torch.tensor([0, 1, -1])
    assert_same(lambda x, i: x[i, :, i], torch.randn(3, 2, 4), index, foreign=["aten.index.Tensor"])

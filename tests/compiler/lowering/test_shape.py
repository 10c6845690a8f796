"""Data movement against torch, static and at two sizes of one dynamic graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lowering_oracle import assert_same, lowered, ops

DYNAMIC = ({1: torch.export.Dim("S", min=2, max=64)},)
MOVES = {
    "view": lambda x: x.view(2, -1, 2, 3),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(2, (3, 2)),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim(0, -1),
    "unsqueeze": lambda x: x.unsqueeze(0).unsqueeze(-1),
    "squeeze": lambda x: x[:1].squeeze(0),
    "expand": lambda x: x[:, None].expand(-1, 3, -1, -1),
    "repeat": lambda x: x.repeat(2, 1, 3, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=0),
    "tile": lambda x: x.tile(1, 2),
    "select": lambda x: (x.select(1, 0), x[:, -1], x[0], x[..., -2]),
    "slice": lambda x: (x[:, 1:], x[:, :-1], x[..., 1:4], x[..., ::2], x[:, -1:], x[..., -3:-1]),
    "clamped_slice": lambda x: (x[:, :100], x[..., 2:99], x[..., -99:3]),
    "split": lambda x: (*x.split([2, 4], -1), *x.split(4, -1)),
    "chunk": lambda x: x.chunk(3, -1),
    "unbind": lambda x: x.unbind(2),
    "cat": lambda x: torch.cat([x, x * 2, x[:, :1]], 1),
    "cat_promotes": lambda x: torch.cat([x, torch.ones(2, 1, 6, dtype=torch.int64)], 1),
    "stack": lambda x: torch.stack([x, x + 1], -1),
    "pad": lambda x: (F.pad(x, (1, 2)), F.pad(x, (-1, 1, 0, 3), value=2.5)),
    "flip": lambda x: x.flip(0, 2),
    "roll": lambda x: x.roll(2, -1),
    "clone": lambda x: x.clone().contiguous().detach(),
    "to": lambda x: (x.to(torch.float64), x.to(torch.int64), x.half(), x > 0),
    "full": lambda x: (torch.full_like(x, 3), x.new_zeros(x.shape[1]), torch.ones(x.shape[1], 2)),
    "arange": lambda x: torch.arange(x.shape[1]),
    "arange_step": lambda x: (torch.arange(1, 9, 3), torch.arange(0.5, 3.0, 0.25)),
    "linspace": lambda x: torch.linspace(-1, 1, 7),
    "tril": lambda x: (x.tril(), x.triu(1), x.tril(-1)),
    "mask": lambda x: torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)),
    "eye": lambda x: torch.eye(4),
    "in_place": lambda x: _written(x),
}


def _written(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, :1] = 5.0
    y[..., 2] = x[..., 0]
    return y


def _every_move(x: torch.Tensor) -> dict[str, object]:
    return {name: move(x) for name, move in MOVES.items()}


def test_moves() -> None:
    assert_same(_every_move, torch.randn(2, 5, 6))


def test_moves_at_two_sizes() -> None:
    assert_same(
        _every_move, torch.randn(2, 5, 6), dynamic=DYNAMIC, others=[(torch.randn(2, 8, 6),)]
    )


@settings(max_examples=5)
@given(st.data())
def test_any_slice(data: st.DataObject) -> None:
    ends, size = st.none() | st.integers(-8, 8), data.draw(st.integers(1, 6))
    cut = st.builds(slice, ends, ends, st.integers(1, 3))
    cuts = data.draw(st.lists(cut, min_size=12, max_size=12))
    assert_same(lambda x: [x[:, cut] for cut in cuts], torch.randn(2, size))


@settings(max_examples=3)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_any_permutation(shape: list[int], data: st.DataObject) -> None:
    orders = [data.draw(st.permutations(range(len(shape)))) for _ in range(5)]
    assert_same(lambda x: [x.permute(*order).reshape(-1) for order in orders], torch.randn(shape))


@pytest.mark.quick
def test_views_of_nothing_vanish() -> None:
    graph = lowered(lambda x: F.dropout(x.clone().contiguous(), 0.5, False) + 1, (torch.ones(3),))
    assert ops(graph) == ["add"]


def test_slices_of_a_buffer_to_the_dynamic_size_need_no_minimum() -> None:
    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.randn(1, 64, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mask[:, : x.shape[1], : x.shape[1]]

    graph = assert_same(
        Positions(),
        torch.randn(1, 5, 1),
        dynamic=DYNAMIC,
        others=[(torch.randn(1, 9, 1),), (torch.randn(1, 64, 1),)],
    )
    assert "min(" not in str(graph)


def test_strided_views_are_gathered() -> None:
    assert_same(lambda x: x.as_strided((3, 4), (2, 1), 1), torch.randn(2, 6))
    assert_same(lambda x: x.unfold(1, 3, 2), torch.randn(2, 7))

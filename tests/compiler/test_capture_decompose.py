"""Which exported programs are lowered without a retrace, and that writes survive it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowering_oracle import Function, assert_same
from tilewright.compiler.capture_decompose import needs_decomposition


def _found(function, *inputs: Tensor) -> str | None:
    program = torch.export.export(Function(function).eval(), inputs, strict=False)
    return needs_decomposition(program)


def _shares(x: Tensor) -> Tensor:
    y = x.exp()
    y /= y.sum(-1, keepdim=True)
    return y.clamp_(0.1, 0.5)


def _through_a_view(x: Tensor) -> Tensor:
    y = x.exp()
    row = y[0]
    y += 1
    return row * 2


def _through_a_reshape(x: Tensor) -> Tensor:
    y = x.exp()
    flat = y.reshape(-1)
    y *= 3
    return flat + 1


def _through_dropout(x: Tensor) -> Tensor:
    y = x.exp()
    same = torch.dropout(y, 0.5, False)
    y += 1
    return same * 2


def _through_a_cast(x: Tensor) -> Tensor:
    y = x.exp()
    same = y.to(torch.float32)
    same += 1
    return y * 2


def _into_a_view(x: Tensor) -> Tensor:
    y = x.exp()
    y[0] += 1
    return y


def _of_an_input(x: Tensor) -> Tensor:
    y = x.view(-1)
    z = y.clone()
    z += 1
    return z


def _of_another_type(x: Tensor) -> Tensor:
    y = x.half().exp()
    y += x
    return y


@pytest.mark.quick
@pytest.mark.parametrize("function", [_shares, _of_an_input, lambda x: x.chunk(2, -1)[1].T])
def test_what_lowering_takes_is_not_retraced(function) -> None:
    x = torch.randn(3, 4)
    assert _found(function, x) is None
    assert_same(function, x)


@pytest.mark.quick
@pytest.mark.parametrize(
    "function",
    [_through_a_view, _through_a_reshape, _through_a_cast, _into_a_view],
)
def test_writes_that_a_view_shows_are_retraced(function) -> None:
    x = torch.randn(3, 4)
    assert _found(function, x)
    assert_same(function, x)


@pytest.mark.parametrize("function", [_of_another_type, lambda x: torch.einsum("ij,kj->ik", x, x)])
def test_casting_writes_and_unknown_composites_are_retraced(function) -> None:
    x = torch.randn(3, 4)
    assert _found(function, x)
    assert_same(function, x, tolerance=1e-3)


def test_a_write_behind_an_idle_dropout_is_retraced() -> None:
    assert _found(_through_dropout, torch.randn(3, 4))

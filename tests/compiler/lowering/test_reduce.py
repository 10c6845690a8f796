"""Reductions and scans against torch."""

from __future__ import annotations

import pytest
import torch

from lowering_oracle import assert_same

REDUCTIONS = {
    "sum": lambda x: (x.sum(), x.sum(1), x.sum((0, 2), keepdim=True)),
    "mean": lambda x: (x.mean(), x.mean(-1, keepdim=True), x.mean((1, 2))),
    "amax": lambda x: (x.amax(1), x.amin((0, 1)), x.max(), x.min()),
    "max": lambda x: (*x.max(1), *x.min(-1, keepdim=True)),
    "argmax": lambda x: (x.argmax(), x.argmax(1), x.argmin(-1, keepdim=True)),
    "prod": lambda x: (x.prod(), x.prod(1)),
    "any": lambda x: ((x > 1).any(), (x > 1).any(1), (x > -9).all(2, keepdim=True)),
    "var": lambda x: (x.var(1), x.var((0, 2), correction=0, keepdim=True), x.std(-1), x.std()),
    "var_mean": lambda x: torch.var_mean(x, -1),
    "norm": lambda x: (x.norm(), x.norm(dim=1), x.norm(1, dim=-1), x.norm(float("inf"), dim=1)),
    "softmax": lambda x: (x.softmax(-1), x.softmax(1, dtype=torch.float64), x.log_softmax(0)),
    "logsumexp": lambda x: (x.logsumexp(1), x.logsumexp((0, 2), keepdim=True)),
    "cumsum": lambda x: (x.cumsum(1), (x > 0).cumsum(-1)),
    "topk": lambda x: (*x.topk(2, 0), *x.topk(3, -1, largest=False)),
    "count": lambda x: (x > 0).sum(1),
    "integers": lambda x: (x.long().sum(1), x.long().amax(1), x.sum(1, dtype=torch.float64)),
    "normalize": lambda x: torch.nn.functional.normalize(x, dim=-1),
}


def _every(x: torch.Tensor) -> dict[str, object]:
    return {name: reduction(x) for name, reduction in REDUCTIONS.items()}


@pytest.mark.quick
def test_reductions() -> None:
    assert_same(_every, torch.randn(3, 4, 5) * 2, tolerance=2e-6)


def test_reductions_at_two_sizes() -> None:
    assert_same(
        _every,
        torch.randn(3, 4, 5),
        dynamic=({1: torch.export.Dim("S", min=2, max=64)},),
        others=[(torch.randn(3, 7, 5),)],
        tolerance=2e-6,
    )


def test_scalars_reduce_to_themselves() -> None:
    assert_same(lambda x: (x.sum(), x.max(), x.mean()), torch.tensor(2.5))
    assert_same(lambda x: x.sum(0).sum(0), torch.randn(3, 4), tolerance=2e-6)


def test_sort_stays_with_torch() -> None:
    graph = assert_same(lambda x: x.sort(-1), torch.randn(3, 7), foreign=["aten.sort.default"])
    assert len([node for node in graph.nodes if node.op == "aten"]) == 1

"""Reductions, softmax, and the places of extremes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..call import Call, Result, Rule


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor]) -> Rule:
    def rule(c: Call) -> Tensor:
        x = c.tensor(0)
        axes = c.ints("axes") if c.value(1) is None else c.integers(1)
        if not axes:
            if c.integer("noop_with_empty_axes", 0):
                return function(x.unsqueeze(0), [0], False)
            axes = list(range(x.dim()))
        return function(x, axes, bool(c.integer("keepdims", 1))) if axes else x

    return rule


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _arg(function: Callable[..., Tensor]) -> Rule:
    def rule(c: Call) -> Tensor:
        c.allow("select_last_index", 0)
        return function(c.tensor(0), c.integer("axis", 0), keepdim=bool(c.integer("keepdims", 1)))

    return rule


def _softmax(c: Call) -> Tensor:
    return torch.softmax(c.tensor(0), c.integer("axis", -1))


def _log_softmax(c: Call) -> Tensor:
    return torch.log_softmax(c.tensor(0), c.integer("axis", -1))


def _top_k(c: Call) -> Result:
    """The first of equals come first, which torch.topk does not promise."""
    count, axis = c.integers(1), c.integer("axis", -1)
    assert count is not None
    c.integer("sorted", 1)  # an order that is not asked for does no harm
    descending = bool(c.integer("largest", 1))
    found = torch.sort(c.tensor(0), dim=axis, descending=descending, stable=True)
    return tuple(part.narrow(axis, 0, count[0]) for part in found)


RULES: dict[str, Rule] = {
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "LogSoftmax": _log_softmax,
    "ReduceL1": _reduced(lambda x, axes, keep: _sum(x.abs(), axes, keep)),
    "ReduceL2": _reduced(lambda x, axes, keep: _sum(x * x, axes, keep).sqrt()),
    "ReduceLogSum": _reduced(lambda x, axes, keep: _sum(x, axes, keep).log()),
    "ReduceLogSumExp": _reduced(torch.logsumexp),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceProd": _reduced(_prod),
    "ReduceSum": _reduced(_sum),
    "ReduceSumSquare": _reduced(lambda x, axes, keep: _sum(x * x, axes, keep)),
    "Softmax": _softmax,
    "TopK": _top_k,
}

"""What workspaces hold between a kernel's launches, by torch: for checks that run a launch in part
and complete what it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch

from ...ir.dims import evaluate
from ...ir.node import Node
from ...ir.ops.moe import through_expert
from .layout import located

Between: TypeAlias = Callable[
    [Sequence[torch.Tensor | None], Mapping[str, int]], Mapping[int, torch.Tensor]
]
"""(operands, sizes) → what workspaces should hold, by their index. Operands are the buffers that
those of the call lie in."""


def between_launches(node: Node) -> Between | None:
    """Of a call whose kernel has several launches that each take long; None for others."""
    if node.op != "moe_experts":
        return None

    def values(
        operands: Sequence[torch.Tensor | None], sizes: Mapping[str, int]
    ) -> Mapping[int, torch.Tensor]:
        views = [_view(x, arg, sizes) for x, arg in zip(operands, node.args, strict=True)]
        return dict(enumerate(_pairs(views, dict(node.attrs))))

    return values


def _view(
    buffer: torch.Tensor | None, arg: Node | None, sizes: Mapping[str, int]
) -> torch.Tensor | None:
    if buffer is None or arg is None:
        return None
    layout = located(arg)[1]
    shape, strides = ([evaluate(s, sizes) for s in some] for some in (arg.shape, layout.strides))
    offset = buffer.storage_offset() + evaluate(layout.offset, sizes)
    return torch.as_strided(buffer, shape, strides, offset)


def _pairs(
    views: Sequence[torch.Tensor | None], attrs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each pair of a token and a slot gives to ``down`` [pairs, F], and gets [pairs, K]."""
    x, ids, _, gate_up, down = cast("Sequence[torch.Tensor]", views[:5])
    experts, slots = ids.reshape(-1), ids.shape[1]
    hidden = x.new_zeros(len(experts), down.shape[2])
    results = x.new_zeros(len(experts), down.shape[1])
    for expert in experts.unique().tolist():
        (pairs,) = torch.where(experts == expert)
        biases = [None if bias is None else bias[expert] for bias in views[5:]]
        found = through_expert(x[pairs // slots], gate_up[expert], down[expert], *biases, **attrs)
        hidden[pairs], results[pairs] = found
    return hidden, results

"""SmoothQuant: large channels of activations moved into the weights (Xiao et al., 2211.10438)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...ir.dtypes import DType
from ...ir.ops.quant import LARGEST

ALPHAS = tuple(step / 20 for step in range(6, 20))
"""Shares of the difficulty that weights take over, 0.3 to 0.95; the paper mostly has 0.5."""
MOST_ROWS = 512  # that a share is judged by


def smoothquant_vector(
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    codes: DType,
    tie: Callable[[torch.Tensor], torch.Tensor] = lambda vector: vector,
) -> torch.Tensor:
    """``max|x_k| ** a / max|w_k| ** (1 - a)`` of each column k, for the a that loses the least when
    x is rounded by rows and the weights are; ones where none of them helps.

    Args:
        rows: the inputs [tokens, K] of the linears.
        weights: of all linears [N, K] that read them.
        codes: what both are rounded to, with a scale a row.
        tie: makes scales equal that must be.
    """
    wide, whole = rows.float(), torch.cat([weight.float() for weight in weights])
    some = wide[:: max(len(wide) // MOST_ROWS, 1)]
    wanted = some @ whole.T
    # Each token counts alike: some are a thousand times as large as the others.
    norms = wanted.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    best, chosen = float("inf"), torch.ones(wide.shape[1])
    for vector in (chosen, *(tie(smooth_scales(wide, whole, alpha)) for alpha in ALPHAS)):
        found = rounded_rows(some / vector, codes) @ rounded_rows(whole * vector, codes).T
        loss = ((found - wanted).square().sum(-1) / norms).sum().item()
        if loss < best:
            best, chosen = loss, vector
    return chosen


def smooth_scales(rows: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """The scales [K] of one share ``alpha``; 1 where a column of either is zero."""
    of_x, of_w = rows.abs().amax(0), weight.abs().amax(0)
    vector = of_x.pow(alpha) / of_w.pow(1 - alpha)
    usable = (of_x > 0) & (of_w > 0) & torch.isfinite(vector) & (vector > 0)
    return torch.where(usable, vector, torch.ones_like(vector))


def rounded_rows(x: torch.Tensor, codes: DType) -> torch.Tensor:
    """x [M, K], each row rounded to codes that its largest magnitude sets the scale of."""
    largest = LARGEST[codes]
    scale = x.abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    steps = (x / scale).clamp(-largest, largest)
    return (steps.round() if codes is DType.I8 else steps.to(codes.torch).float()) * scale

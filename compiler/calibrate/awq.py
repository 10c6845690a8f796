"""AWQ: columns of large activations scaled up before they are rounded (Lin et al., 2306.00978)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .grid import Grid, gram_of, loss_of

STEPS = 20  # powers of the activations' mean magnitude that are tried: 0, 1/20, … 1


def awq_vector(
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    grid: Grid,
    tie: Callable[[torch.Tensor], torch.Tensor] = lambda vector: vector,
) -> torch.Tensor:
    """The scales [K] of columns that lose the least when the scaled weights are rounded to nearest.

    Args:
        rows: the inputs [tokens, K] of the linears.
        weights: of all linears [N, K] that read them.
        grid: of the codes.
        tie: makes scales equal that must be.
    """
    gram = gram_of(rows)
    mean = tie(rows.float().abs().mean(0)).clamp(min=1e-8)
    best, chosen = float("inf"), torch.ones_like(mean)
    for step in range(STEPS + 1):
        vector = mean.pow(step / STEPS)
        vector = vector / (vector.max() * vector.min()).sqrt()
        loss = 0.0
        for weight in weights:
            groups = grid.by_group(weight.float() * vector)
            rounded = grid.rounded(groups, *grid.ranges(groups))
            value = rounded.flatten(1)[:, : weight.shape[1]] / vector
            loss += loss_of(value - weight.float(), gram)
        if loss < best:
            best, chosen = loss, vector
    return chosen


def clipped_codes(
    weight: torch.Tensor, gram: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes to nearest, with ranges that are cut where that loses less of ``x @ weightᵀ``.

    Returns:
        Codes [N, K], scales and zero points [N, G], and the weight [N, K] that they stand for.
    """
    width = weight.shape[1]
    scale, zero = grid.fit(weight, gram)
    scales, zeros = grid.columns(scale, width), grid.columns(zero, width)
    codes = grid.encode(weight, scales, zeros)
    return codes, scale, zero, (codes - zeros) * scales

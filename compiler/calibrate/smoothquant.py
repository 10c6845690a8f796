"""SmoothQuant: large channels of activations moved into the weights (Xiao et al., 2211.10438)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALPHA = 0.5  # the share of the difficulty that weights take over


def smoothquant_vector(rows: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """``max|x_k| ** ALPHA / max|w_k| ** (1 - ALPHA)`` of each column k; 1 where either is zero.

    Args:
        rows: the inputs [tokens, K] of the linears.
        weights: of all linears [N, K] that read them.
    """
    of_x = rows.float().abs().amax(0)
    of_w = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    vector = of_x.pow(ALPHA) / of_w.pow(1 - ALPHA)
    usable = (of_x > 0) & (of_w > 0) & torch.isfinite(vector) & (vector > 0)
    return torch.where(usable, vector, torch.ones_like(vector))

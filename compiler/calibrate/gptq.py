"""GPTQ: codes column by column, each column's error made good by those that follow (Frantar et al.,
2210.17323), columns of the largest activations first.
"""

from __future__ import annotations

import torch

from ...errors import VerificationError
from .grid import Grid

BLOCK = 128  # columns whose errors are made good in one product
DAMPING = (0.01, 0.1, 1.0)  # of the mean of the diagonal; more where it cannot be inverted


def gptq_codes(
    name: str, weight: torch.Tensor, gram: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes that lose little of ``x @ weightᵀ``.

    Scales are chosen before any column moves, so that they stay those of neighbouring columns
    whatever the order (static groups).

    Args:
        name: of the weight, for errors.
        weight: [N, K], float32.
        gram: [K, K], the mean of x xᵀ.
        grid: of the codes.

    Returns:
        Codes [N, K], scales and zero points [N, G], and the weight [N, K] that they stand for.
    """
    width = weight.shape[1]
    scale, zero = grid.fit(weight, gram)
    order = gram.diagonal().argsort(descending=True, stable=True)
    inverse = _factor(name, gram[order][:, order])
    left = weight[:, order].T.contiguous()  # columns of the weight are rows here
    scales, zeros = (grid.columns(part, width)[:, order].T.contiguous() for part in (scale, zero))
    codes = torch.empty_like(left)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        errors = torch.empty(stop - start, left.shape[1])
        for column in range(start, stop):
            own = left[column]
            codes[column] = grid.encode(own, scales[column], zeros[column])
            value = (codes[column] - zeros[column]) * scales[column]
            error = (own - value) / inverse[column, column]
            errors[column - start] = error
            left[column:stop] -= torch.outer(inverse[column, column:stop], error)
        left[stop:] -= inverse[start:stop, stop:].T @ errors
    back = order.argsort()
    found = codes[back].T.contiguous()
    value = (found - grid.columns(zero, width)) * grid.columns(scale, width)
    return found, scale, zero, value


def _factor(name: str, gram: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, damped; columns that x never uses stand alone."""
    wide = gram.double()
    unused = wide.diagonal() == 0
    wide[unused, unused] = 1.0
    mean = wide.diagonal().mean()
    for damping in DAMPING:
        damped = wide + torch.eye(len(wide), dtype=wide.dtype) * (mean * damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                factor: torch.Tensor = upper.float()
                return factor
    raise VerificationError(
        f"GPTQ of {name!r}",
        expected="inputs whose products can be inverted",
        found="a matrix that is singular however it is damped",
        remedy="Calibrate with more text, or use method='rtn'.",
    )

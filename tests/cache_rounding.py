"""What a row of a cache of codes stands for, by the definition."""

from __future__ import annotations

import torch

from tilewright.ir.dtypes import DType


def rounded(x: torch.Tensor, codes: DType) -> torch.Tensor:
    """x [..., D] by the largest code for its largest magnitude; e4m3 by the scale of the least
    error among that and seven more, ``2 ** (j / 8)`` of it with 16 bits behind the point.
    """
    largest = 127.0 if codes is DType.I8 else 448.0
    least = x.abs().amax(-1, keepdim=True) / largest
    least = least.where(least > 0, 1.0)
    if codes is DType.I8:
        return (x / least).round() * least
    steps, tried = x / least, []
    for j in range(8):
        factor, inverse = (torch.tensor(2.0 ** (e / 8), dtype=torch.float64) for e in (j, -j))
        factor, inverse = ((f * 2**16).round().div(2**16).to(x.dtype) for f in (factor, inverse))
        found = (steps * inverse).clamp(-largest, largest).to(torch.float8_e4m3fn)
        tried.append(found.to(x.dtype) * factor)
    every = torch.stack(tried)
    best = (every - steps).square().sum(-1).argmin(0)
    return every.gather(0, best[None, ..., None].expand(1, *x.shape))[0] * least

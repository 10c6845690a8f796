"""Heads of attention that become fewer: rows of a projection as combinations of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .weight_quant import Result


def _map_rows(maps: Tensor, x: Tensor) -> Tensor:
    """maps [B, M, N] over x [B * R * N, …]: each run of N rows becomes M, R runs a map. Products in
    float32 at least, rounded once.
    """
    count, outs, ins = maps.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    runs = x.to(wide).reshape(count, -1, ins, x[0].numel())
    mapped = torch.matmul(maps.to(wide).unsqueeze(1), runs)
    return mapped.reshape(count * runs.shape[1] * outs, *x.shape[1:]).to(x.dtype)


def _mapped_result(maps: Result, x: Result) -> Result:
    (shape, dtype), (wide, kind) = maps, x
    if len(shape) != 3 or not wide or not dtype.is_floating_point or not kind.is_floating_point:
        raise TypeError("float maps [B, M, N] over floats [B * R * N, …]")
    count, outs, ins = shape
    if not count * ins or wide[0] % (count * ins):
        raise ValueError(f"{wide[0]} rows are no multiple of {count} * {ins}")
    return (wide[0] // ins * outs, *wide[1:]), kind


MAPPED: Mapping[str, tuple[Callable[..., Tensor], Callable[..., Result]]] = {
    "map_rows": (_map_rows, _mapped_result),
}
"""By name: the function, and what it gives for shapes and dtypes of operands."""

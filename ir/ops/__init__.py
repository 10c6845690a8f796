"""The op families. Importing this package registers every op."""

from . import (
    attention,
    cache,
    control,
    elementwise,
    leaf,
    matmul,
    moe,
    norm,
    reduce,
    shape,
)

__all__ = [
    "attention",
    "cache",
    "control",
    "elementwise",
    "leaf",
    "matmul",
    "moe",
    "norm",
    "reduce",
    "shape",
]

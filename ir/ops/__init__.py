"""The op families. Importing this package registers every op."""

from . import (
    append_kv,
    attention,
    cache,
    control,
    elementwise,
    leaf,
    matmul,
    moe,
    norm,
    quant,
    reduce,
    sample,
    scaled_cache,
    shape,
    share_pages,
)

__all__ = [
    "append_kv",
    "attention",
    "cache",
    "control",
    "elementwise",
    "leaf",
    "matmul",
    "moe",
    "norm",
    "quant",
    "reduce",
    "sample",
    "scaled_cache",
    "shape",
    "share_pages",
]

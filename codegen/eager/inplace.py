"""The ops that own a cache, writing it in place where their references copy it first."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...ir.ops.cache import attend_slots
from ...ir.schema import Tensors


def _kv_write(cache: torch.Tensor, new: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    cache.view(-1, *cache.shape[2:])[slot_mapping] = new
    return cache


IN_PLACE: dict[str, Callable[..., Tensors]] = {
    "kv_write": _kv_write,
    "slot_attention": attend_slots,
}
"""By op: a function with the signature of the op's reference that returns the caches it was given."""

"""The ops that own a cache, writing it in place where their references copy it first."""

from __future__ import annotations

from collections.abc import Callable

from ...ir.ops.append_kv import append_rows
from ...ir.ops.cache import attend_slots, write_rows
from ...ir.ops.scaled_cache import append_codes
from ...ir.schema import Tensors

IN_PLACE: dict[str, Callable[..., Tensors]] = {
    "append_kv": append_rows,
    "kv_write": write_rows,
    "scaled_append_kv": append_codes,
    "slot_attention": attend_slots,
}
"""By op: a function with the signature of the op's reference that returns the caches it was
given.
"""

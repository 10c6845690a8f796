"""The order of the passes, in one place. Nothing registers itself here."""

from __future__ import annotations

from typing import Literal

from .base import Pass
from .canonicalize import CANONICALIZE
from .kv_cache import PAGED_CACHE, SLOT_CACHE

_CACHES: dict[str | None, tuple[Pass, ...]] = {
    None: (),
    "paged": (PAGED_CACHE,),
    "slot": (SLOT_CACHE,),
}


def pipeline(cache: Literal["paged", "slot"] | None) -> tuple[Pass, ...]:
    """The passes from a captured graph to one that backends lower.

    Args:
        cache: form of the KV cache of a causal LM; None for plain modules, which keep their signature.
    """
    return (
        # One spelling for each value.
        CANONICALIZE,
        # One sequence becomes ragged tokens of many, over a cache.
        *_CACHES[cache],
        # What the rewrite left: reshapes and permutes that cancel.
        CANONICALIZE,
    )

"""Attention with fewer KV heads: what is asked for, where it can be had, and the rewrite."""

from __future__ import annotations

from .config import GQA, METHODS, resolve_heads
from .convert import HeadPlan, LayerMaps, convert_heads, heads_pass
from .sites import Declined, HeadSite, Projection, head_sites

__all__ = [
    "GQA",
    "METHODS",
    "Declined",
    "HeadPlan",
    "HeadSite",
    "LayerMaps",
    "Projection",
    "convert_heads",
    "head_sites",
    "heads_pass",
    "resolve_heads",
]

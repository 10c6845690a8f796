"""Checkpoints as lazy tensors, weight expressions over them, and tokenizers."""

from __future__ import annotations

from .checkpoint import Checkpoint, LazyTensor, open_checkpoint
from .weight_text import parse_weight
from .weights import (
    FOLDABLE,
    Apply,
    Full,
    Held,
    Random,
    Stored,
    Weight,
    apply_weight,
    weight_leaves,
)

__all__ = [
    "FOLDABLE",
    "Apply",
    "Checkpoint",
    "Full",
    "Held",
    "LazyTensor",
    "Random",
    "Stored",
    "Weight",
    "apply_weight",
    "open_checkpoint",
    "parse_weight",
    "weight_leaves",
]

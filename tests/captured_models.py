"""Tiny causal LMs and what is captured of them, once for all tests that only read both."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from tilewright.compiler.capture_types import Captured
from tilewright.compiler.hf_model import capture_causal_lm
from tiny_models import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@cache
def captured_model(name: str) -> tuple[PreTrainedModel, Captured]:
    """The `tiny_model` of a family, and its capture."""
    model = tiny_model(name)
    return model, capture_causal_lm(model)

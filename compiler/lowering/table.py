"""The one table of lowering rules, by op name without overload."""

from __future__ import annotations

from collections.abc import Mapping

from . import attention, create, elementwise, indexing, matmul, nn, reduce, shape
from .base import Rule

RULES: Mapping[str, Rule] = {
    **elementwise.RULES,
    **shape.RULES,
    **create.RULES,
    **reduce.RULES,
    **matmul.RULES,
    **nn.RULES,
    **attention.RULES,
    **indexing.RULES,
}

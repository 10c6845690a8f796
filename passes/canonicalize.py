"""Canonicalise: one spelling for each value, so that recognisers need one pattern each.

Common subexpressions and dead code need no rule: equal nodes are one object, and unreachable
ones are not in the graph.
"""

from __future__ import annotations

from ..ir.graph import Graph
from .base import Pass
from .canonicalize_activations import ACTIVATION_RULES
from .canonicalize_constants import CONSTANT_RULES
from .canonicalize_elementwise import ELEMENTWISE_RULES
from .canonicalize_masks import MASK_RULES
from .canonicalize_matmul import MATMUL_RULES
from .canonicalize_shape import SHAPE_RULES
from .rewrite import rewrite

CANONICAL_RULES = (
    *CONSTANT_RULES,
    *SHAPE_RULES,
    *ELEMENTWISE_RULES,
    *MASK_RULES,
    *MATMUL_RULES,
    *ACTIVATION_RULES,
)


def canonicalize(graph: Graph) -> Graph:
    """Brings every value to its normal form; values stay the same up to rounding.

    Before::

        reshape_0: f32[S, 64] = reshape(x, shape=(S, 64))
        permute_0: f32[64, 32] = permute(w, dims=(1, 0))
        matmul_0: f32[S, 32] = matmul(reshape_0, permute_0)
        reshape_1: f32[1, S, 32] = reshape(matmul_0, shape=(1, S, 32))
        div_0: f32[1, S, 32] = div(reshape_1, f32(4.0))

    After::

        linear_0: f32[1, S, 32] = linear(x, w)
        mul_0: f32[1, S, 32] = mul(linear_0, f32(0.25))
    """
    return rewrite(graph, CANONICAL_RULES)


CANONICALIZE = Pass("canonicalize", canonicalize)

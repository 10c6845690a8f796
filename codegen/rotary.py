"""Rotary tables over positions: cos and sin as functions of each token's position alone, for
runtimes that look them up.
"""

from __future__ import annotations

from collections.abc import Collection

from ..ir.build import make, reshape
from ..ir.dtypes import DType
from ..ir.graph import Graph
from ..ir.node import Node
from ..ir.schema import schema
from .constants import is_constant, substitute


def tabulable(value: Node, positions: Node, dtypes: Collection[DType] = (DType.F32,)) -> bool:
    """Whether row t of ``value`` [T, 1, …, W] is one of ``dtypes``, a function of
    ``positions[t]``.
    """
    tokens = positions.shape[0]
    if positions.type.rank != 1 or isinstance(tokens, int) or not positions.dtype.is_integer:
        return False
    if value.dtype not in dtypes or any(size != 1 for size in value.shape[1:-1]):
        return False
    below = Graph("tables", (), (value,)).nodes
    return all(n is positions or is_constant(n) or _by_token(n, positions) for n in below)


def _by_token(node: Node, positions: Node) -> bool:
    """Whether an op keeps rows apart, given that its operands have one row a token in axis 0."""
    tokens = positions.shape[0]
    symbols = positions.type.symbols
    if node.type.symbols != symbols or node.shape[0] != tokens:
        return False
    if any(not is_constant(o) and o.shape[:1] != (tokens,) for o in node.operands):
        return False
    if schema(node.op).elementwise:
        return all(is_constant(o) or o.type.rank == node.type.rank for o in node.operands)
    if node.op in ("slice", "concat", "softmax", "cumsum"):
        return node.attr("dim") != 0
    if node.op in ("matmul", "linear"):
        return all(is_constant(o) for o in node.operands[1:]) and node.operands[0].type.rank == 2
    if node.op == "index_select":
        return node.attr("dim") == 0 and is_constant(node.operands[0])
    return node.op in ("reshape", "expand", "embedding")


def table_of(value: Node, positions: Node, max_len: int) -> Node:
    """A ``tabulable`` value [T, 1, …, W] over the positions 0 … max_len - 1: [max_len, W]."""
    width = value.shape[-1]
    every = make("iota", size=max_len, dtype=positions.dtype)
    sizes = {str(positions.shape[0]): max_len}
    return reshape(substitute(value, {positions: every}, sizes), max_len, width)

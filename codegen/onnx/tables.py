"""Rotary tables over positions, for kernels that look cos and sin up by position."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.build import make, reshape
from ...ir.dtypes import DType
from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.schema import schema
from .constants import is_constant, substitute
from .emitter import Emitter


@dataclass(frozen=True, slots=True)
class Tables:
    """cos and sin [max_len, R/2] by name, their indices, and q, k, v before rotation."""

    cos: str
    sin: str
    positions: Node
    interleaved: bool
    unrotated: tuple[Node, Node, Node]


def position_tables(e: Emitter, node: Node) -> Tables | None:
    """The tables by which GroupQueryAttention rotates q and k, None where it is done outside.

    Both must be rotated alike, from cos and sin that are functions of each token's position alone.
    The op wants the head dim in multiples of 16 and R/2 in multiples of 8.
    """
    q, k, v = node.operands[:3]
    if e.max_len is None or q.op != "rope" or k.op != "rope" or node not in e.members:
        return None
    alike = q.args[1:] == k.args[1:] and q.attr("layout") == k.attr("layout")
    width, half = q.shape[-1], q.operands[1].shape[-1]
    assert isinstance(width, int) and isinstance(half, int)
    inside = all(r.operands[0] in e.values for r in (q, k))
    if not alike or not inside or width % 16 or half % 8:
        return None
    cos, sin = q.operands[1:]
    positions = [n for n in Graph("tables", (), (cos, sin)).nodes if n.op == "input"]
    if len(positions) != 1 or not tabulable(cos, positions[0]) or not tabulable(sin, positions[0]):
        return None
    cos_table, sin_table = (e.fold(_table(x, positions[0], e.max_len, half)) for x in (cos, sin))
    interleaved = q.attr("layout") == "interleaved"
    return Tables(
        cos_table, sin_table, positions[0], interleaved, (q.operands[0], k.operands[0], v)
    )


def tabulable(value: Node, positions: Node) -> bool:
    """Whether row t of ``value`` [T, 1, …, W] is float32, a function of ``positions[t]``."""
    tokens = positions.shape[0]
    if positions.type.rank != 1 or isinstance(tokens, int) or not positions.dtype.is_integer:
        return False
    if value.dtype is not DType.F32 or any(size != 1 for size in value.shape[1:-1]):
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


def _table(value: Node, positions: Node, max_len: int, half: int) -> Node:
    """``value`` over the positions 0 … max_len - 1."""
    every = make("iota", size=max_len, dtype=positions.dtype)
    sizes = {str(positions.shape[0]): max_len}
    return reshape(substitute(value, {positions: every}, sizes), max_len, half)

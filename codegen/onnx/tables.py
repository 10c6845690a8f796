"""Rotary tables over positions, for kernels that look cos and sin up by position."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.graph import Graph
from ...ir.node import Node
from ..rotary import table_of, tabulable
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
    cos_table, sin_table = (e.fold(table_of(x, positions[0], e.max_len)) for x in (cos, sin))
    interleaved = q.attr("layout") == "interleaved"
    return Tables(
        cos_table, sin_table, positions[0], interleaved, (q.operands[0], k.operands[0], v)
    )

"""What may stand in a fused group, and over which space it runs.

A group's kernel walks rows: its space is all leading axes, one row an index, times the last axis,
the width. A value in a group has one element an index of the space, or one a row (last axis 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.dims import Size
from ..ir.node import Node
from ..ir.schema import schema

REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "prod", "any", "all"})
NORMS = frozenset({"rms_norm", "layer_norm"})
ROW_OPS = REDUCTIONS | NORMS | {"softmax"}
LOADS = frozenset({"embedding", "index_select"})  # rows picked by an index


@dataclass(frozen=True, slots=True)
class Space:
    """Rows times width.

    Attributes:
        lead: sizes of the rows' axes, those of size 1 left out.
        width: size of the last axis.
        reduces: whether something runs along the width, so that it cannot stand for another one.
    """

    lead: tuple[Size, ...]
    width: Size
    reduces: bool

    def joined(self, other: Space) -> Space | None:
        """The space in which both can run, None when there is none.

        One element a row (width 1) fits rows of any width.
        """
        if self.lead != other.lead:
            return None
        reduces = self.reduces or other.reduces
        if self.width == other.width:
            return Space(self.lead, self.width, reduces)
        narrow, wide = (self, other) if self.width == 1 else (other, self)
        if narrow.width != 1 or narrow.reduces:
            return None
        return Space(self.lead, wide.width, reduces)


def space_of(node: Node) -> Space | None:
    """The space that a node runs over as a member of a group; None for ops that are no members:
    matmuls, attention, data movement, scalars, complex numbers, reductions not over the last axis.
    """
    if len(node.types) != 1 or any(t.dtype.is_complex for o in node.operands for t in o.types):
        return None
    if node.op in ROW_OPS:
        return _row_space(node)
    is_load = node.op == "embedding" or (node.op == "index_select" and node.attr("dim") == 0)
    if is_load or schema(node.op).elementwise or node.op == "gated":
        return _space(node.shape, False)
    return None


def _row_space(node: Node) -> Space | None:
    x = node.operands[0]
    if not x.type.rank:
        return None
    last = x.type.rank - 1
    if node.op in REDUCTIONS and node.attr("dims") != (last,):
        return None
    if node.op == "softmax" and node.attr("dim") != last:
        return None
    return _space(x.shape, True)


def _space(shape: tuple[Size, ...], reduces: bool) -> Space | None:
    if not shape:
        return None
    return Space(_wide(shape[:-1]), shape[-1], reduces)


def is_view(node: Node) -> bool:
    """Whether a node only says where to read: groups take such views of operands in, as loads."""
    if node.op == "reshape":
        return _wide(node.shape) == _wide(node.operands[0].shape)
    return node.op in ("slice", "expand")


def source(node: Node) -> Node | None:
    """The value that a member reads at its own index (or row) through ``node``: the node itself, or
    what broadcasting views of it start from. None where elements change places on the way.
    """
    while is_view(node):
        x = node.operands[0]
        if node.op == "slice":
            return None
        if node.op == "reshape":
            per_row = _loses_axis(x) and node.shape == (*x.shape, 1)
            same = x.type.rank and node.type.rank and x.shape[-1] == node.shape[-1]
            if not per_row and (_loses_axis(x) or not same):
                return None
        elif _loses_axis(x):
            return None
        node = x
        if _loses_axis(x):
            return x
    return None if _loses_axis(node) else node


def _loses_axis(node: Node) -> bool:
    """One value a row, without an axis of size 1: it lines up through a reshape only."""
    return node.op in REDUCTIONS and not node.attr("keepdim")


def aligned_operands(node: Node) -> tuple[Node, ...]:
    """The operands that a member reads at its own index, so that they may be made in its group."""
    if node.op in LOADS:
        return ()
    return node.operands[:1] if node.op in ROW_OPS else node.operands


def _wide(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    return tuple(size for size in shape if size != 1)

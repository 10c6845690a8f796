"""Where the members of a fused body find their operands: in memory, variables, constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...ir.dims import Size
from ...ir.graph import Graph
from ...ir.node import Node
from .generate_space import (
    BODY_VIEWS,
    ROW_OPS,
    Access,
    Space,
    access,
    lined_up,
    picked,
    viewed,
    walked_shape,
)
from .layout import Layout


@dataclass(frozen=True, slots=True)
class Read:
    """One operand of a member.

    Attributes:
        source: an input of the body, another member, or a const.
        access: for an input, where in its buffer.
        table: for what an index picks rows of, (number of rows, stride between them).
    """

    source: Node
    access: Access | None = None
    table: tuple[Size, Size] | None = None


Reads = Mapping[tuple[Node, int], Read]


def members_of(body: Graph) -> list[Node]:
    """The nodes of a body that compute something, in order."""
    passive = BODY_VIEWS | {"input", "const"}
    return [node for node in body.nodes if node.op not in passive]


def picks_rows(node: Node) -> bool:
    """Whether it reads the rows of a table that an index names."""
    return node.op == "embedding" or (node.op == "index_select" and node.attr("dim") == 0)


def along_rows(node: Node) -> bool:
    """Whether a node that reduces or normalises does so along the last axis."""
    last = node.operands[0].type.rank - 1
    if node.op in ("rms_norm", "layer_norm"):
        return True
    return node.attr("dim") == last if node.op == "softmax" else node.attr("dims") == (last,)


def resolve(
    body: Graph, members: Sequence[Node], layouts: Sequence[Layout | None], space: Space
) -> Reads | None:
    """The read of each (member, position of its operand); None where one is out of reach."""
    known = dict(zip(body.inputs, layouts, strict=True))
    inside = set(members)
    reads: dict[tuple[Node, int], Read] = {}
    for node in members:
        if node.op in ROW_OPS and not along_rows(node):
            return None
        for position, arg in enumerate(node.args):
            if arg is None:
                continue
            read = _read(node, position, arg, known, inside)
            if read is None:
                return None
            reads[node, position] = read
    return reads if all(_in_space(read, space) for read in reads.values()) else None


def _in_space(read: Read, space: Space) -> bool:
    return read.access is None or len(read.access.lead) == len(space.lead)


def _read(
    node: Node,
    position: int,
    arg: Node,
    known: Mapping[Node, Layout | None],
    inside: set[Node],
) -> Read | None:
    views: list[Node] = []
    source = arg
    while source not in inside and source.op in BODY_VIEWS:
        views.insert(0, source)
        source = source.operands[0]
    if source.op == "const":
        return Read(source)
    if source in inside:
        return None if picks_rows(node) or not lined_up(views, source) else Read(source)
    layout = known[source]
    for view in views:
        layout = None if layout is None else viewed(view, layout)
    if layout is None:
        return None
    if picks_rows(node):
        return _picked(node, position, source, layout)
    return Read(source, access(layout, arg.shape, walked_shape(node)))


def _picked(node: Node, position: int, source: Node, layout: Layout) -> Read:
    """A read of a table or of the index into it: the result has the axes of the index, then those
    of the table's rows.
    """
    table, index = node.operands
    behind = node.type.rank - index.type.rank
    if position == 1:
        return Read(source, picked(layout.offset, (*layout.strides, *(0,) * behind), node.shape))
    strides = (*(0,) * index.type.rank, *layout.strides[1:])
    found = picked(layout.offset, strides, node.shape)
    return Read(source, found, (table.shape[0], layout.strides[0]))

"""Where the operands of an epilogue lie, over the rows and columns of the product's result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....ir.dims import Size
from ....ir.node import Node
from ..generate_space import BODY_VIEWS, viewed
from ..layout import Layout


@dataclass(frozen=True, slots=True)
class Place:
    """Element [token, column] lies at ``offset + token * row + column * column_stride``.

    Attributes:
        source: the input of the body.
        offset, row, column: in elements; strides of 0 where the operand is broadcast.
    """

    source: Node
    offset: Size
    row: Size
    column: Size


def place_of(arg: Node, shape: Sequence[Size], known: Mapping[Node, Layout | None]) -> Place | None:
    """The place of a view of an input of the body that broadcasts to ``shape`` [T, N]; None for
    anything else.
    """
    views: list[Node] = []
    source = arg
    while source.op in BODY_VIEWS:
        views.insert(0, source)
        source = source.operands[0]
    layout = known.get(source)
    for view in views:
        layout = None if layout is None else viewed(view, layout)
    if layout is None or len(shape) != 2 or len(arg.shape) > 2:
        return None
    missing = 2 - len(arg.shape)
    own = (1,) * missing + arg.shape
    strides = (0,) * missing + layout.strides
    row, column = (0 if size == 1 else stride for size, stride in zip(own, strides, strict=True))
    fits = all(size == 1 or size == full for size, full in zip(own, shape, strict=True))
    return Place(source, layout.offset, row, column) if fits else None

"""What a generated kernel walks: rows times width, and where each value is read within that.

A row is an index into all leading axes of size other than 1, the width is the last axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...ir.dims import Dim, Size, call, product
from ...ir.node import Node
from . import layout as layouts
from .layout import Layout, dense

REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "prod", "any", "all"})
NORMS = frozenset({"rms_norm", "layer_norm"})
ROW_OPS = REDUCTIONS | NORMS | {"softmax"}
BODY_VIEWS = frozenset({"slice", "expand", "reshape"})
INT32_ELEMENTS = 2**31


@dataclass(frozen=True, slots=True)
class Space:
    """Rows times width.

    Attributes:
        lead: sizes of the rows' axes, none of them 1.
        width: size of the last axis.
    """

    lead: tuple[Size, ...]
    width: Size

    @property
    def rows(self) -> Size:
        """How many rows there are."""
        return product(self.lead)

    def fits(self, shape: Sequence[Size]) -> bool:
        """Whether a value of this shape has one element an index, or one a row (last size 1)."""
        return bool(shape) and wide(shape[:-1]) == self.lead and shape[-1] in (1, self.width)


@dataclass(frozen=True, slots=True)
class Access:
    """Element ``(row, column)`` is element ``offset + row · lead + column · stride`` of a buffer.

    Attributes:
        offset: in elements.
        lead: strides of the rows' axes, 0 where the value does not vary.
        stride: of the columns, 0 where there is one value a row.
    """

    offset: Size
    lead: tuple[Size, ...]
    stride: Size

    @property
    def rows(self) -> bool:
        """Whether it varies with the row."""
        return any(stride != 0 for stride in self.lead)

    @property
    def cols(self) -> bool:
        """Whether it varies with the column."""
        return self.stride != 0


def wide(shape: Iterable[Size]) -> tuple[Size, ...]:
    """The sizes other than 1."""
    return tuple(size for size in shape if size != 1)


def walked_shape(node: Node) -> tuple[Size, ...]:
    """The shape that a member runs over: what it reduces, or what it makes."""
    return node.operands[0].shape if node.op in ROW_OPS else node.shape


def space_of(members: Iterable[Node]) -> Space | None:
    """The space in which all members run; None when there is none."""
    shapes = [walked_shape(node) for node in members]
    if not shapes or not all(shapes):
        return None
    widths = wide(dict.fromkeys(shape[-1] for shape in shapes))
    space = Space(wide(shapes[0][:-1]), widths[0] if widths else 1)
    return space if all(map(space.fits, shapes)) else None


def viewed(node: Node, layout: Layout) -> Layout | None:
    """Where a view (slice, expand, permute, reshape) of a value lies; None when it must copy."""
    return layouts.VIEWED[node.op](node, layout)


def access(layout: Layout, shape: Sequence[Size], walked: Sequence[Size]) -> Access:
    """How a value of ``shape`` is read by what walks ``walked``, which it broadcasts to."""
    missing = len(walked) - len(shape)
    strides = (0,) * missing + tuple(
        0 if own == 1 else stride for own, stride in zip(shape, layout.strides, strict=True)
    )
    return picked(layout.offset, strides, walked)


def picked(offset: Size, strides: Sequence[Size], walked: Sequence[Size]) -> Access:
    """An access by one stride an axis of ``walked``; axes of size 1 do not count."""
    pairs = zip(walked[:-1], strides[:-1], strict=True)
    lead = tuple(stride for size, stride in pairs if size != 1)
    return Access(offset, lead, strides[-1] if walked[-1] != 1 else 0)


def dense_access(shape: Sequence[Size], space: Space) -> Access:
    """Where a result of ``shape`` is written: one element an index, or one a row."""
    strides = dense(shape).strides
    if wide(shape[:-1]) == space.lead and shape and shape[-1] == space.width:
        return picked(0, strides, shape)
    return Access(0, tuple(s for n, s in zip(shape, strides, strict=True) if n != 1), 0)


def loses_axis(node: Node) -> bool:
    """One value a row without an axis of size 1: only a reshape lines it up again."""
    return node.op in REDUCTIONS and not node.attr("keepdim")


def lined_up(views: Iterable[Node], node: Node) -> bool:
    """Whether ``views`` (inner first) of a member only broadcast it, so that all stays in place."""
    lost = loses_axis(node)
    for view in views:
        before = view.operands[0].shape
        if view.op == "reshape":
            appended = lost and view.shape == (*before, 1)
            kept = not lost and bool(view.shape) and view.shape[-1] == before[-1]
            if not appended and not kept:
                return False
            lost = False
        elif view.op != "expand" or lost:
            return False
    return not lost


def ceil_div(a: Size, b: int) -> Size:
    """``a / b`` rounded up."""
    return call("floordiv", a + b - 1, b)


def extent(found: Access, space: Space) -> int | None:
    """The largest element index it reaches, None where that depends on a symbol."""
    pairs = [*zip(space.lead, found.lead, strict=True), (space.width, found.stride)]
    total = found.offset
    for size, stride in pairs:
        if stride != 0:
            total = total + (size - 1) * stride
    return None if isinstance(total, Dim) else total

"""Where the elements of a value lie in a buffer: views cost nothing, kernels read through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...ir.dims import Dim, Size, divide, product
from ...ir.node import Node


@dataclass(frozen=True, slots=True)
class Layout:
    """Element ``[i, j, …]`` of the value is element ``offset + i * strides[0] + …`` of its buffer.

    Attributes:
        offset: in elements.
        strides: in elements, one a dimension of the value; 0 where it is broadcast.
    """

    offset: Size
    strides: tuple[Size, ...]


def dense(shape: Sequence[Size]) -> Layout:
    """The layout of a contiguous, row-major buffer of this shape."""
    return Layout(0, tuple(product(shape[axis + 1 :]) for axis in range(len(shape))))


def is_dense(layout: Layout, shape: Sequence[Size]) -> bool:
    """Whether it is ``dense(shape)``, whatever the strides of dimensions of size 1."""
    pairs = zip(layout.strides, dense(shape).strides, shape, strict=True)
    return layout.offset == 0 and all(a == b or size == 1 for a, b, size in pairs)


def located(node: Node) -> tuple[Node, Layout]:
    """The value that ``node`` is a view of, in a dense buffer of its own, and where it lies there.

    A node that is no view, or a reshape that would have to copy, is its own dense buffer.
    """
    if node.op not in VIEWS:
        return node, dense(node.shape)
    base, layout = located(node.operands[0])
    moved = VIEWED[node.op](node, layout)
    return (node, dense(node.shape)) if moved is None else (base, moved)


def _slice(node: Node, layout: Layout) -> Layout:
    dim, start, step = (node.attr(name) for name in ("dim", "start", "step"))
    assert isinstance(dim, int) and isinstance(step, int) and isinstance(start, int | Dim)
    stride = layout.strides[dim]
    strides = (*layout.strides[:dim], stride * step, *layout.strides[dim + 1 :])
    return Layout(layout.offset + stride * start, strides)


def _permute(node: Node, layout: Layout) -> Layout:
    dims = node.attr("dims")
    assert isinstance(dims, tuple)
    return Layout(layout.offset, tuple(layout.strides[d] for d in dims))  # type: ignore[index]


def _expand(node: Node, layout: Layout) -> Layout:
    shape = node.operands[0].shape
    added = len(node.shape) - len(shape)
    pairs = zip(shape, node.shape[added:], layout.strides, strict=True)
    kept = (stride if old == new else 0 for old, new, stride in pairs)
    return Layout(layout.offset, ((0,) * added + tuple(kept)))


def _reshape(node: Node, layout: Layout) -> Layout | None:
    """Splits and merges of dimensions that lie one behind the other, else None (it must copy)."""
    old = [
        (size, stride)
        for size, stride in zip(node.operands[0].shape, layout.strides, strict=True)
        if size != 1
    ]
    runs = _runs(old)
    strides: list[Size] = []
    for size in reversed(node.shape):
        if size == 1:
            strides.append(0)
            continue
        while runs and runs[-1][0] == 1:
            runs.pop()
        rest = divide(runs[-1][0], size) if runs else None
        if rest is None:
            return None
        strides.append(runs[-1][1])
        runs[-1] = (rest, runs[-1][1] * size)
    return Layout(layout.offset, tuple(reversed(strides)))


def _runs(dims: Sequence[tuple[Size, Size]]) -> list[tuple[Size, Size]]:
    """Neighbouring dimensions that step through memory as one, as (size, innermost stride)."""
    runs: list[tuple[Size, Size]] = []
    for size, stride in dims:
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    return runs


VIEWED: Mapping[str, Callable[[Node, Layout], Layout | None]] = {
    "slice": _slice,
    "permute": _permute,
    "expand": _expand,
    "reshape": _reshape,
    "share_pages": lambda node, layout: layout,  # a promise that the runtime keeps
}
"""By op: from where its operand lies to where its result does; None where it has to copy."""
VIEWS = frozenset(VIEWED)

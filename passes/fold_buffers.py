"""Buffers that hold what can be computed: causal masks, positions, single numbers. Each is
proven by its values.

Models register a lower triangle or a range for the longest context and slice it; as index
arithmetic it is recognised as a mask or as positions, and takes no memory.
"""

from __future__ import annotations

import torch

from ..ir.build import const, make, reshape
from ..ir.dims import Size
from ..ir.dtypes import DType
from ..ir.graph import Graph, param_name
from ..ir.node import Node
from .base import Pass
from .canonicalize import canonicalize
from .match import fit, full
from .rewrite import Context, Rule, rewrite

MAX_BUFFER = 1 << 28  # elements; nobody keeps a larger mask


def number_buffer(node: Node, context: Context) -> Node | None:
    """An integer or boolean param of one element → that constant."""
    if node.dtype.is_float or node.dtype.is_complex or node.type.numel != 1:
        return None
    return full(context.weights[param_name(node)].load().item(), node)


def position_buffer(node: Node, context: Context) -> Node | None:
    """``slice(param, 0, S)`` of ``arange(N)`` in the last dimension → ``iota(size=S)``."""
    param, bounds = _sliced_param(node)
    if param is None or not param.dtype.is_integer or not param.type.rank:
        return None
    size, last = param.shape[-1], param.type.rank - 1
    if param.type.numel != size or set(bounds) - {last} or size == 1:
        return None
    values = context.weights[param_name(param)].load().reshape(-1)
    if not torch.equal(values, torch.arange(values.numel(), dtype=values.dtype)):
        return None
    start, stop = bounds.get(last, (0, size))
    count = make("iota", size=stop - start, dtype=node.dtype)
    offset = make("dim_value", size=start, dtype=node.dtype)
    return reshape(make("add", count, offset), *node.shape)


def mask_buffer(node: Node, context: Context) -> Node | None:
    """A param [..., N, N] whose values are a where ``0 <= i - j < window`` and b elsewhere,
    sliced to [..., S, S].
    """
    param, bounds = _sliced_param(node)
    if param is None or not _may_be_mask(param, bounds):
        return None
    values = context.weights[param_name(param)].load()
    found = _band(values.reshape(values.shape[-2:]))
    if found is None:
        return None
    inside, outside, window = found
    size = node.shape[-1]
    key = make("iota", size=size, dtype=DType.I64)
    query = reshape(key, size, 1)
    visible = make("le", key, query)
    if window is not None:
        near = make("gt", key, make("add", query, const(-window, DType.I64)))
        visible = make("logical_and", visible, near)
    dtype = node.dtype
    return fit(make("where", visible, const(inside, dtype), const(outside, dtype)), node)


def _sliced_param(node: Node) -> tuple[Node | None, dict[int, tuple[Size, Size]]]:
    """The param below slices of step one, and the bounds by dimension."""
    bounds: dict[int, tuple[Size, Size]] = {}
    while node.op == "slice" and node.attr("step") == 1:
        dim, start, stop = (node.attr(name) for name in ("dim", "start", "stop"))
        if dim in bounds:
            return None, {}
        bounds[dim] = (start, stop)  # type: ignore[index, assignment]
        node = node.operands[0]
    return (node if node.op == "param" else None), bounds


def _may_be_mask(param: Node, bounds: dict[int, tuple[Size, Size]]) -> bool:
    """Square, of leading ones, cut to [:S, :S]; uncut only where it cannot be a matrix of
    weights.
    """
    rank, shape = param.type.rank, param.shape
    if rank < 2 or shape[-1] != shape[-2] or shape[-1] == 1 or any(s != 1 for s in shape[:-2]):
        return False
    numel = param.type.numel
    cut = bounds.get(rank - 1), bounds.get(rank - 2)
    if cut[0] != cut[1] or len(bounds) not in (0, 2) or not isinstance(numel, int):
        return False
    if numel > MAX_BUFFER or (cut[0] is not None and cut[0][0] != 0):
        return False
    return cut[0] is not None or rank > 2 or not param.dtype.is_float


def _band(values: torch.Tensor) -> tuple[float, float, int | None] | None:
    """(value inside, value outside, window or None) of a causal band, None for any other matrix."""
    size = values.shape[0]
    inside, outside = values[0, 0], values[0, -1]
    width = int((values[-1] == inside).sum())
    distance = torch.arange(size)[:, None] - torch.arange(size)[None, :]
    band = (distance >= 0) & (distance < width)
    if inside == outside or not torch.equal(torch.where(band, inside, outside), values):
        return None
    return inside.item(), outside.item(), None if width == size else width


BUFFER_RULES: tuple[Rule, ...] = (
    Rule("number_buffer", ("param",), number_buffer),
    Rule("position_buffer", ("slice", "param"), position_buffer),
    Rule("mask_buffer", ("slice", "param"), mask_buffer),
)


def fold_buffers(graph: Graph) -> Graph:
    """Replaces buffers by the arithmetic that makes them, in normal form and cut to length.

    Before, with ``mask`` the lower triangle of ones::

        mask: f32[1, 1, 256, 256] = param("mask")
        slice_0: f32[1, 1, S, 256] = slice(mask, dim=2, start=0, stop=S)
        slice_1: f32[1, 1, S, S] = slice(slice_0, dim=3, start=0, stop=S)

    After::

        iota_0: i64[S] = iota(size=S, dtype=i64)
        reshape_0: i64[S, 1] = reshape(iota_0, shape=(S, 1))
        le_0: bool[S, S] = le(iota_0, reshape_0)
        where_0: f32[S, S] = where(le_0, f32(1.0), f32(0.0))
    """
    folded = rewrite(graph, BUFFER_RULES)
    return graph if folded == graph else canonicalize(folded)


FOLD_BUFFERS = Pass("fold_buffers", fold_buffers)

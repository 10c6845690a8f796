"""Shapes, slices, gathers and scatters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call, Result, Rule
from ..values import Counting, Filled, Known, Size, Value, same, tensor_of

_FAR = (1 << 31) - 1  # by which exporters say "to the end"


def _reshape(c: Call) -> Tensor:
    x, target = c.tensor(0), c.sizes(1)
    assert target is not None
    zeros = not c.integer("allowzero", 0)
    return x.reshape([x.shape[i] if zeros and same(s, 0) else s for i, s in enumerate(target)])


def _flatten(c: Call) -> Tensor:
    x, axis = c.tensor(0), c.integer("axis", 1)
    cut = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:cut]), math.prod(x.shape[cut:]))


def _transpose(c: Call) -> Tensor:
    x = c.tensor(0)
    return x.permute(c.ints("perm") or list(range(x.dim()))[::-1])


def _squeeze(c: Call) -> Tensor:
    x, axes = c.tensor(0), c.integers(1)
    if axes is None:
        axes = [axis for axis, size in enumerate(x.shape) if same(size, 1)]
    gone = {axis % x.dim() for axis in axes}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in gone])


def _unsqueeze(c: Call) -> Tensor:
    x, axes = c.tensor(0), c.integers(1)
    assert axes is not None
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _concat(c: Call) -> Tensor:
    axis = c.integer("axis", 0)
    values = [c.needed(index) for index in range(len(c.values))]
    parts = [value for value in values if not same(value.shape[axis], 0)] or values[:1]
    tensors = [tensor_of(part) for part in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=axis)


def _split(c: Call) -> Result:
    x, axis, lengths = c.tensor(0), c.integer("axis", 0), c.sizes(1)
    if lengths is None:
        count, size = len(c.step.outputs), x.shape[axis]
        each = -(-size // count)
        lengths = [each] * (count - 1) + [size - each * (count - 1)]
    return tuple(torch.split(x, lengths, dim=axis))


def _slice(c: Call) -> Value:
    x, starts, ends = c.needed(0), c.sizes(1), c.sizes(2)
    assert starts is not None and ends is not None
    axes, steps = c.integers(3), c.integers(4)
    steps = steps or [1] * len(starts)
    for axis, start, end, step in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        x = _cut(c, x, axis % len(x.shape), start, end, step)
    return x


def _cut(c: Call, x: Value, axis: int, start: Size, end: Size, step: int) -> Value:
    size = x.shape[axis]
    whole = same(end, size) or (isinstance(end, int) and end >= _FAR)
    if step == 1 and same(start, 0) and whole:
        return x
    tensor = tensor_of(x)
    if step > 0:
        cut = slice(start, None if whole else end, step)
        return tensor[(slice(None),) * axis + (cut,)]
    if not all(isinstance(part, int) for part in (size, start, end)):
        c.refuse("a backward slice of a fixed size", f"size {size}")
    stop = None if end < -size else end
    places = list(range(*slice(start, stop, step).indices(int(size))))
    return tensor.index_select(axis, torch.tensor(places, dtype=torch.int64))


def _gather(c: Call) -> Value:
    x, index, axis = c.needed(0), c.needed(1), c.integer("axis", 0)
    size = x.shape[axis]
    if isinstance(index, Counting) and index.rank == 1:
        if same(index.start, 0) and same(index.length, size):
            return x
        places = tensor_of(index)
    elif isinstance(index, Known):
        places = tensor_of(index)
        places = torch.where(places < 0, places + size, places)
    else:
        places = _wrapped(c, tensor_of(index), size)
    tensor = tensor_of(x)
    axis %= tensor.dim()
    if axis == 0 and tensor.dim() == 2:
        return F.embedding(places.long(), tensor)
    picked = tensor.index_select(axis, places.reshape(-1).long())
    return picked.reshape(*tensor.shape[:axis], *places.shape, *tensor.shape[axis + 1 :])


def _wrapped(c: Call, index: Tensor, size: Size) -> Tensor:
    """Indices, those below 0 counted from the end, unless a Where sends these out of range."""
    maker = c.makers.get(c.step.inputs[1])
    guard = c.makers.get(maker.inputs[0]) if maker is not None and maker.op == "Where" else None
    if maker is not None and guard is not None and guard.op == "Less":
        limit, far = c.constant(guard.inputs[1]), c.constant(maker.inputs[1])
        beyond = isinstance(size, int) and far is not None and far >= size
        beyond = beyond or (far is not None and far >= _FAR)
        if guard.inputs[0] == maker.inputs[2] and limit == 0 and beyond:
            return tensor_of(c.every[maker.inputs[2]])
    return torch.where(index < 0, index + size, index)


def _gather_elements(c: Call) -> Tensor:
    x, index, axis = c.tensor(0), c.tensor(1).long(), c.integer("axis", 0)
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


def _scatter_elements(c: Call) -> Tensor:
    c.allow("reduction", "none")
    x, index, axis = c.tensor(0), c.tensor(1).long(), c.integer("axis", 0)
    index = torch.where(index < 0, index + x.shape[axis], index)
    return torch.scatter(x, axis, index, c.tensor(2))


def _gather_nd(c: Call) -> Tensor:
    c.allow("batch_dims", 0)
    x, index = c.tensor(0), c.tensor(1).long()
    columns = index.unbind(-1)
    wrapped = [
        torch.where(column < 0, column + x.shape[axis], column)
        for axis, column in enumerate(columns)
    ]
    return x[tuple(wrapped)]


def _expand(c: Call) -> Value:
    x, target = c.needed(0), c.sizes(1)
    assert target is not None
    lead = (1,) * (len(target) - len(x.shape))
    own = (*lead, *x.shape)
    wide = [1] * (len(own) - len(target)) + target
    shape = tuple(a if same(b, 1) else b for a, b in zip(own, wide, strict=True))
    if isinstance(x, Known) and x.array.size == 1:
        return Filled(x.items[0], shape, x.dtype)
    return tensor_of(x).expand(shape)


def _tile(c: Call) -> Tensor:
    repeats = c.sizes(1)
    assert repeats is not None
    return c.tensor(0).repeat(repeats)


def _pad(c: Call) -> Tensor:
    c.allow("mode", "constant")
    x, pads, filler = c.tensor(0), c.sizes(1), c.known(2)
    assert pads is not None
    if c.value(2) is not None and filler is None:
        c.refuse("a constant to pad with", "a computed value")
    axes = c.integers(3) or list(range(x.dim()))
    flat: list[Size] = [0] * (2 * x.dim())
    for place, axis in enumerate(axes):
        last = 2 * (x.dim() - 1 - axis % x.dim())
        flat[last], flat[last + 1] = pads[place], pads[place + len(axes)]
    return F.pad(x, flat, value=filler.items[0] if filler else 0)


def _constant(c: Call) -> Tensor:
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        found = c.attribute(name)
        if isinstance(found, torch.Tensor):
            return found
        if found is not None:
            dtype = torch.float32 if "float" in name else torch.int64
            return torch.tensor(found, dtype=dtype)
    return c.refuse("a constant of numbers", ", ".join(c.step.attributes))


def _range(c: Call) -> Tensor:
    ends = [c.sizes(index) for index in range(3)]
    start, limit, step = (end[0] for end in ends if end is not None)
    return torch.arange(start, limit, step, dtype=c.needed(0).dtype)


def _trilu(c: Call) -> Tensor:
    diagonal = c.integers(1) or [0]
    function = torch.triu if c.integer("upper", 1) else torch.tril
    return function(c.tensor(0), diagonal=diagonal[0])


def _tensor_scatter(c: Call) -> Tensor:
    past, new, start = c.tensor(0), c.tensor(1), c.maybe(2)
    axis = c.integer("axis", -2) % past.dim()
    places = torch.arange(new.shape[axis])
    lead = [1] * past.dim()
    lead[axis] = new.shape[axis]
    places = places.reshape(lead)
    if start is not None:
        places = places + start.long().reshape(-1, *[1] * (past.dim() - 1))
    if c.text("mode", "linear") == "circular":
        places = places % past.shape[axis]
    return torch.scatter(past, axis, places.expand(new.shape), new)


def _cumsum(c: Call) -> Tensor:
    c.allow("exclusive", 0)
    x, axes = c.tensor(0), c.integers(1)
    assert axes is not None
    if c.integer("reverse", 0):
        return x.flip(axes[0]).cumsum(axes[0], dtype=x.dtype).flip(axes[0])
    return x.cumsum(axes[0], dtype=x.dtype)


RULES: dict[str, Rule] = {
    "Concat": _concat,
    "Constant": _constant,
    "CumSum": _cumsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": lambda c: c.needed(0),
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "TensorScatter": _tensor_scatter,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}

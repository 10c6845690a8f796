"""Sizes, small integers and counting vectors, computed while a graph is traced.

Each rule gives None where what is known does not suffice; the op is then traced over tensors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..call import Call, KnownRule
from ..values import Counting, Filled, Known, Size, Value, holds, known, same
from .dtypes import dtype_of

_MOST = 1024  # elements: what is longer is data, not sizes


class _Open(Exception):
    """A number that symbols leave open."""


def _array(elements: object, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, dtype=object)
    array[...] = elements
    return array


def _apply(function: Callable[..., Any], dtype: torch.dtype, *operands: Known) -> Known | None:
    arrays = np.broadcast_arrays(*(operand.array for operand in operands))
    if arrays[0].size > _MOST:
        return None
    result = np.empty(arrays[0].shape, dtype=object)
    try:
        for place in np.ndindex(*result.shape):
            result[place] = function(*(array[place] for array in arrays))
    except (_Open, ZeroDivisionError):
        return None
    return Known(result, dtype)


def _decided(condition: bool | np.bool_ | torch.SymBool) -> bool:
    found = holds(condition)
    if found is None:
        raise _Open
    return found


def _divided(a: Any, b: Any) -> Any:
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    if _decided(a >= 0) and _decided(b > 0):
        return a // b
    quotient = abs(int(a)) // abs(int(b))
    return quotient if (a < 0) == (b < 0) else -quotient


def _modulo(a: Any, b: Any) -> Any:
    if isinstance(a, float) or isinstance(b, float):
        raise _Open
    return a % b


def greatest(a: Any, b: Any) -> Any:
    """The greater of two sizes."""
    at_least = holds(a >= b)
    if at_least is None:
        return torch.sym_max(a, b)
    return a if at_least else b


def _least(a: Any, b: Any) -> Any:
    at_most = holds(a <= b)
    if at_most is None:
        return torch.sym_min(a, b)
    return a if at_most else b


def _arithmetic(function: Callable[[Any, Any], Any]) -> KnownRule:
    def rule(c: Call) -> Value | None:
        a, b = c.known(0), c.known(1)
        if a is None or b is None or c.integer("fmod", 0):
            return None
        return _apply(function, a.dtype, a, b)

    return rule


def _shifted(function: Callable[[Any, Any], Any]) -> KnownRule:
    """Adds a number to a counting vector, or takes it away."""
    plain = _arithmetic(function)

    def rule(c: Call) -> Value | None:
        a, b = c.value(0), c.value(1)
        if function is operator.add and isinstance(a, Known):
            a, b = b, a
        if isinstance(a, Counting) and isinstance(b, Known) and b.array.size == 1:
            rank = max(a.rank, b.array.ndim)
            start = function(a.start, b.items[0])
            moved = Counting(start, a.length, a.rank, a.axis, a.dtype)
            return moved.laid(rank, a.axis + rank - a.rank)
        return plain(c)

    return rule


def _extreme(function: Callable[[Any, Any], Any]) -> KnownRule:
    def rule(c: Call) -> Value | None:
        operands = [c.known(index) for index in range(len(c.values))]
        first, *rest = operands
        for operand in rest:
            if first is None or operand is None:
                return None
            first = _apply(function, first.dtype, first, operand)
        return first

    return rule


def _compared(function: Callable[[Any, Any], Any]) -> KnownRule:
    def rule(c: Call) -> Value | None:
        a, b = c.value(0), c.value(1)
        if isinstance(a, Counting) and isinstance(b, Known) and b.array.size == 1:
            # A comparison with one number that is the same at both ends is so in between.
            limit, rank = b.items[0], max(a.rank, b.array.ndim)
            ends = [holds(function(a.start, limit)), holds(function(a.start + a.length - 1, limit))]
            if ends[0] is None or ends[0] != ends[1] or function in (operator.eq, operator.ne):
                return None
            return Filled(ends[0], a.laid(rank, a.axis + rank - a.rank).shape, torch.bool)
        if not isinstance(a, Known) or not isinstance(b, Known):
            return None
        return _apply(lambda x, y: _decided(function(x, y)), torch.bool, a, b)

    return rule


def _unary(function: Callable[[Any], Any]) -> KnownRule:
    def rule(c: Call) -> Value | None:
        x = c.known(0)
        return None if x is None else _apply(function, x.dtype, x)

    return rule


def _whole(c: Call, shape: Callable[[np.ndarray], np.ndarray]) -> Value | None:
    x = c.known(0)
    return None if x is None else Known(shape(x.array), x.dtype)


def _shape(c: Call) -> Value:
    sizes = list(c.needed(0).shape)
    return known(sizes[c.integer("start", 0) : c.integer("end", len(sizes))])


def _size(c: Call) -> Value:
    return known(math.prod(c.needed(0).shape))


def _cast(c: Call) -> Value | None:
    x, dtype = c.value(0), dtype_of(c, c.integer("to", 0))
    if isinstance(x, Counting) and not dtype.is_floating_point and dtype is not torch.bool:
        return Counting(x.start, x.length, x.rank, x.axis, dtype)
    if isinstance(x, Filled) and x.dtype is torch.bool and dtype is torch.bool:
        return x
    if not isinstance(x, Known):
        return None
    if dtype.is_floating_point:
        return _apply(lambda v: v if isinstance(v, torch.SymInt) else float(v), dtype, x)
    if dtype is torch.bool:
        return _apply(lambda v: _decided(v != 0), dtype, x)
    return _apply(lambda v: v if isinstance(v, torch.SymInt) else int(v), dtype, x)


def _concat(c: Call) -> Value | None:
    parts = [c.known(index) for index in range(len(c.values))]
    if any(part is None for part in parts):
        return None
    arrays = [part.array for part in parts if part is not None]
    assert parts[0] is not None
    return Known(np.concatenate(arrays, axis=c.integer("axis", 0)), parts[0].dtype)


def _gather(c: Call) -> Value | None:
    x, index, axis = c.value(0), c.known(1), c.integer("axis", 0)
    if index is None or any(not isinstance(i, int) for i in index.items):
        return None
    places = index.array.astype(np.int64)
    if isinstance(x, Known):
        return Known(_array(np.take(x.array, places, axis=axis), _taken(x, places, axis)), x.dtype)
    if isinstance(x, Counting) and axis % x.rank == x.axis and places.size == 1:
        (place,) = places.reshape(-1).tolist()
        number = x.start + place + (x.length if place < 0 else 0)
        return Known(_array(number, (1,) * (x.rank - 1 + places.ndim)), x.dtype)
    return None


def _taken(x: Known, places: np.ndarray, axis: int) -> tuple[int, ...]:
    shape = x.array.shape
    axis %= len(shape)
    return (*shape[:axis], *places.shape, *shape[axis + 1 :])


def _slice(c: Call) -> Value | None:
    x = c.known(0)
    if x is None:
        return None
    starts, ends = c.integers(1), c.integers(2)
    assert starts is not None and ends is not None
    axes = c.integers(3) or range(len(starts))
    steps = c.integers(4) or [1] * len(starts)
    cuts = [slice(None)] * x.array.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        low = step < 0 and end < -x.array.shape[axis]
        cuts[axis] = slice(start, None if low else end, step)
    return Known(x.array[tuple(cuts)], x.dtype)


def _axes(c: Call, rank: int) -> list[int] | None:
    axes = c.ints("axes") if c.value(1) is None else c.integers(1)
    return None if axes is None else [axis % rank for axis in axes]


def _squeeze(c: Call) -> Value | None:
    x = c.value(0)
    if isinstance(x, Counting):
        gone = _axes(c, x.rank)
        if gone is None or x.axis in gone:
            return None
        return x.laid(x.rank - len(gone), x.axis - sum(axis < x.axis for axis in gone))
    if not isinstance(x, Known):
        return None
    axes = _axes(c, x.array.ndim)
    return Known(np.squeeze(x.array, axis=None if axes is None else tuple(axes)), x.dtype)


def _unsqueeze(c: Call) -> Value | None:
    x = c.value(0)
    if not isinstance(x, Known | Counting):
        return None
    count = len((c.ints("axes") if c.value(1) is None else c.integers(1)) or ())
    axes = _axes(c, len(x.shape) + count) or []
    if isinstance(x, Known):
        return Known(np.expand_dims(x.array, tuple(axes)), x.dtype)
    rank = x.rank + count
    kept = [axis for axis in range(rank) if axis not in axes]
    return x.laid(rank, kept[x.axis])


def _reshape(c: Call) -> Value | None:
    x, target = c.value(0), c.sizes(1)
    assert target is not None
    if isinstance(x, Known) and all(isinstance(size, int) for size in target):
        zeros = not c.integer("allowzero", 0)
        sizes = [x.array.shape[i] if zeros and s == 0 else s for i, s in enumerate(target)]
        return Known(x.array.reshape([int(size) for size in sizes]), x.dtype)
    if not isinstance(x, Counting):
        return None
    long = [axis for axis, size in enumerate(target) if not same(size, 1)]
    if len(long) != 1 or not (same(target[long[0]], -1) or same(target[long[0]], x.length)):
        return None
    return x.laid(len(target), long[0])


def _range(c: Call) -> Value | None:
    ends = [c.known(index) for index in range(3)]
    if any(end is None for end in ends):
        return None
    start, limit, step = (end.items[0] for end in ends if end is not None)
    assert ends[0] is not None
    if all(isinstance(end, int) for end in (start, limit, step)):
        numbers = range(start, limit, step)
        if len(numbers) <= _MOST:
            return known(list(numbers), ends[0].dtype)
    if step != 1 or isinstance(start, float) or isinstance(limit, float):
        return None
    return Counting(start, limit - start, 1, 0, ends[0].dtype)


def _constant_of_shape(c: Call) -> Value | None:
    sizes, given = c.sizes(0), c.attribute("value")
    assert sizes is not None
    filler = given if isinstance(given, torch.Tensor) else torch.zeros(1)
    number = filler.item()
    if all(isinstance(size, int) for size in sizes) and math.prod(sizes) <= _MOST:
        return Known(_array(number, tuple(int(size) for size in sizes)), filler.dtype)
    return Filled(number, tuple(sizes), filler.dtype)


def _reduced(function: Callable[[Any, Any], Any]) -> KnownRule:
    def rule(c: Call) -> Value | None:
        x = c.known(0)
        if (
            x is None
            or x.array.ndim > 1
            or not x.array.size
            or c.integer("noop_with_empty_axes", 0)
        ):
            return None
        found = x.items[0]
        for item in x.items[1:]:
            found = function(found, item)
        keep = c.integer("keepdims", 1) and x.array.ndim
        return Known(_array(found, (1,) if keep else ()), x.dtype)

    return rule


def _tensor_scatter(c: Call) -> Value | None:
    """What overwrites the whole of a fresh cache is what is read from it."""
    past, new, start = c.value(0), c.needed(1), c.value(2)
    begins = start is None or (isinstance(start, Known) and all(same(s, 0) for s in start.items))
    axis = c.integer("axis", -2)
    if not begins or past is None or not same(past.shape[axis], new.shape[axis]):
        return None
    return new


def uniform(value: Value | None) -> bool | None:
    """The one truth value that a condition has everywhere, None where it has not."""
    if isinstance(value, Filled):
        return bool(value.number)
    if isinstance(value, Known) and len({bool(item) for item in value.items}) == 1:
        return bool(value.items[0])
    return None


def empty(size: Size) -> bool:
    """Whether an axis has no elements."""
    return same(size, 0)


KNOWN: dict[str, KnownRule] = {
    "Shape": _shape,
    "Size": _size,
    "Add": _shifted(operator.add),
    "Sub": _shifted(operator.sub),
    "Mul": _arithmetic(operator.mul),
    "Div": _arithmetic(_divided),
    "Mod": _arithmetic(_modulo),
    "Max": _extreme(greatest),
    "Min": _extreme(_least),
    "Equal": _compared(operator.eq),
    "Less": _compared(operator.lt),
    "LessOrEqual": _compared(operator.le),
    "Greater": _compared(operator.gt),
    "GreaterOrEqual": _compared(operator.ge),
    "Neg": _unary(operator.neg),
    "Identity": lambda c: c.value(0),
    "Cast": _cast,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Transpose": lambda c: _whole(c, lambda a: a.transpose(c.ints("perm"))),
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "ReduceMax": _reduced(greatest),
    "ReduceMin": _reduced(_least),
    "ReduceSum": _reduced(operator.add),
    "ReduceProd": _reduced(operator.mul),
    "TensorScatter": _tensor_scatter,
}
"""By ONNX op; symbols come in through Shape alone."""

"""The closed table of operations that may run on weights at load time.

One row an operation: its torch function and its attributes. Dtypes and most shapes are inferred by
running that function itself, on meta tensors or on tensors of one element, so that inference and
evaluation cannot disagree. (Concatenation and arithmetic are kept off the meta device: there torch
loads its symbolic shapes first, which costs a starting engine more than a second.)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .weight_ggml import GGML
from .weight_heads import MAPPED
from .weight_packed import PACKED
from .weight_quant import QUANTIZING

AttrValue = int | float | str | tuple[int, ...] | torch.dtype
Operand = tuple[tuple[int, ...], torch.dtype] | int | float

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""The dtypes that a weight may have, by their torch name."""


def show_value(value: AttrValue | None) -> str:
    """Print a number, name, tuple of ints or dtype as the weight grammar spells it."""
    if isinstance(value, torch.dtype):
        return f'"{str(value).removeprefix("torch.")}"'
    if isinstance(value, str):
        escaped = "".join(c if c.isprintable() and c not in '"\\' else _escape(c) for c in value)
        return f'"{escaped}"'
    return repr(value)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\{character}" if character in '"\\' else f"\\U{code:08x}"


@dataclass(frozen=True, slots=True)
class WeightOp:
    """One load-time operation.

    Args:
        name: its name in the weight grammar.
        function: takes the operands positionally and the attributes by keyword.
        scalars: whether plain numbers may stand among the operands.
        elementwise: whether it broadcasts its operands and works on each element alone.
        result: shape and dtype of the result, from those of the operands and the attributes; where
            running the function on meta tensors would not tell.
    """

    name: str
    function: Callable[..., Tensor]
    scalars: bool = False
    elementwise: bool = False
    result: Callable[..., tuple[tuple[int, ...], torch.dtype]] | None = None

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the keyword attributes, in printing order."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    @property
    def signature(self) -> str:
        """The operation as a user would write it, e.g. `slice(x, dim, start, stop)`."""
        return f"{self.name}{inspect.signature(self.function)}".replace("torch.", "")

    def check_operands(self, scalars: Sequence[int | float | None]) -> None:
        """Raise TypeError where a number stands that may not (None marks a weight)."""
        numbers = [value for value in scalars if value is not None]
        if len(numbers) == len(scalars):
            raise TypeError("no operand is a weight")
        if numbers and not self.scalars:
            raise TypeError(f"{self.name} takes no plain number")
        for value in numbers:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise TypeError(f"{value!r} is not a number")

    def bind(self, attrs: Mapping[str, AttrValue], rank: int) -> tuple[tuple[str, AttrValue], ...]:
        """Put attributes in order and make dims non-negative; TypeError where one is wrong."""
        if set(attrs) != set(self.attributes):
            raise TypeError(f"attributes {sorted(attrs)} are not {list(self.attributes)}")
        return tuple((name, _check_attr(name, attrs[name], rank)) for name in self.attributes)

    def infer(
        self, operands: Sequence[Operand], attrs: Mapping[str, AttrValue]
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the result; torch's own errors where the operands do not fit.

        Args:
            operands: (shape, dtype) of each weight, or a plain number.
            attrs: bound attributes.
        """
        if self.result is not None:
            return self.result(*operands, **attrs)
        shapes = [operand[0] for operand in operands if isinstance(operand, tuple)]
        if not self.elementwise and self.name != "concat":
            metas = [
                torch.empty(operand[0], dtype=operand[1], device="meta")
                for operand in operands
                if isinstance(operand, tuple)
            ]
            result = self.function(*metas, **attrs)
            return tuple(result.shape), result.dtype
        ones = [
            torch.ones([1] * len(operand[0]), dtype=operand[1], device="cpu")
            if isinstance(operand, tuple)
            else operand
            for operand in operands
        ]
        dtype = self.function(*ones, **attrs).dtype
        if self.elementwise:
            return np.broadcast_shapes(*shapes), dtype
        return _concat_shape(shapes, attrs["dim"]), dtype


def _concat_shape(shapes: Sequence[tuple[int, ...]], dim: AttrValue) -> tuple[int, ...]:
    assert isinstance(dim, int)
    before, after = shapes[0][:dim], shapes[0][dim + 1 :]
    if any(shape[:dim] != before or shape[dim + 1 :] != after for shape in shapes):
        raise ValueError(f"the parts differ in more than dim {dim}")
    return (*before, sum(shape[dim] for shape in shapes), *after)


def _check_attr(name: str, value: AttrValue, rank: int) -> AttrValue:
    if name == "dtype":
        if value not in DTYPES.values():
            raise TypeError(f"dtype {value!r} is not one of {', '.join(DTYPES)}")
        return value
    if name == "form":
        if not isinstance(value, str):
            raise TypeError(f"{name} {value!r} is not a name")
        return value
    if name in ("shape", "dims"):
        if not isinstance(value, (tuple, list)) or not all(type(size) is int for size in value):
            raise TypeError(f"{name} {value!r} is not a tuple of ints")
        return tuple(_from_end(dim, rank) for dim in value) if name == "dims" else tuple(value)
    if type(value) is not int:
        raise TypeError(f"{name} {value!r} is not an int")
    return _from_end(value, rank) if name == "dim" else value


def _from_end(dim: int, rank: int) -> int:
    if not -rank <= dim < rank:
        raise IndexError(f"dim {dim} is out of range for {rank} dimensions")
    return dim % rank


def _concat(*parts: Tensor, dim: int) -> Tensor:
    return torch.cat(parts, dim=dim)


def _cast(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _permute(x: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    return x.permute(dims)


def _reshape(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    if min(shape, default=0) < 0:
        raise ValueError("sizes must be spelled out")
    return x.reshape(shape)


def _expand(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    return x.expand(shape)


def _slice(x: Tensor, *, dim: int, start: int, stop: int) -> Tensor:
    if not 0 <= start <= stop <= x.shape[dim]:
        raise ValueError(f"[{start}:{stop}] is not within {x.shape[dim]}")
    return x.narrow(dim, start, stop - start)


def _pad(x: Tensor, *, dim: int, before: int, after: int) -> Tensor:
    if before < 0 or after < 0:
        raise ValueError("padding must not be negative")
    sizes = [0] * (2 * (x.ndim - 1 - dim)) + [
        before,
        after,
    ]  # torch counts dimensions from the last
    return torch.nn.functional.pad(x, sizes)


def _add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def _sub(x: Tensor, y: Tensor) -> Tensor:
    return x - y


def _mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def _div(x: Tensor, y: Tensor) -> Tensor:
    return x / y


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        return function(x)

    return apply


_SHAPING: Mapping[str, Callable[..., Tensor]] = {
    "concat": _concat,
    "cast": _cast,
    "permute": _permute,
    "reshape": _reshape,
    "expand": _expand,
    "slice": _slice,
    "pad": _pad,
}
_ARITHMETIC: Mapping[str, Callable[..., Tensor]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
}
_UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sin": torch.sin,
    "cos": torch.cos,
}

WEIGHT_OPS: Mapping[str, WeightOp] = {
    **{name: WeightOp(name, function) for name, function in _SHAPING.items()},
    **{name: WeightOp(name, function, True, True) for name, function in _ARITHMETIC.items()},
    **{name: WeightOp(name, _unary(function), False, True) for name, function in _UNARY.items()},
    **{
        name: WeightOp(name, made, result=result)
        for name, (made, result) in {**QUANTIZING, **PACKED, **GGML, **MAPPED}.items()
    },
}
"""Every load-time operation by name."""

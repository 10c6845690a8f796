"""Weight expressions: how a tensor of the graph is made from checkpoint tensors, as data.

A pass that merges, casts or rescales weights builds an expression and reads no tensor; tensors are
loaded once, when an engine starts or is saved. Expressions are frozen and compare by structure, and
`str()` gives text in a closed grammar:

    concat(stored("q.weight"), stored("k.weight"), dim=0)
    cast(mul(stored("w"), 0.5), dtype="bfloat16")

`weight_text.parse_weight` reads that text back, without ever executing any of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..errors import GraphError
from .checkpoint import Checkpoint
from .weight_ops import WEIGHT_OPS, AttrValue, show_value

FOLDABLE: frozenset[str] = frozenset(WEIGHT_OPS)
"""Names of the operations that may be applied to weights ahead of time."""


class Weight:
    """Base of all weight expressions.

    Attributes:
        shape: sizes of the loaded tensor.
        dtype: torch dtype of the loaded tensor.
    """

    __slots__ = ()
    shape: tuple[int, ...]
    dtype: torch.dtype

    def value(self) -> torch.Tensor:
        """Evaluate to a tensor on the CPU that may alias a checkpoint and have any strides."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def load(self) -> torch.Tensor:
        """Evaluate to a contiguous CPU tensor of `shape` and `dtype`.

        It may alias a checkpoint's memory: do not write to it.
        """
        return self.value().contiguous()


@dataclass(frozen=True, slots=True, repr=False)
class Stored(Weight):
    """A tensor of a checkpoint, read when it is loaded.

    Args:
        checkpoint: where it lies (compared by identity).
        name: its name there; an unknown one raises CheckpointError at once.
    """

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        tensor = self.checkpoint.tensor(self.name)
        object.__setattr__(self, "shape", tuple(tensor.shape))
        object.__setattr__(self, "dtype", tensor.dtype)

    def value(self) -> torch.Tensor:
        """Read it; CheckpointError where the file is damaged."""
        return self.checkpoint.tensor(self.name).load()

    def __str__(self) -> str:
        return f"stored({show_value(self.name)})"

    __repr__ = __str__


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Held(Weight):
    """A tensor in memory under a name; equal to another of the same tensor object and name."""

    tensor: torch.Tensor
    name: str
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.tensor.shape))
        object.__setattr__(self, "dtype", self.tensor.dtype)

    def value(self) -> torch.Tensor:
        """The tensor itself, on the CPU."""
        return self.tensor.detach().cpu()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self.tensor is other.tensor and self.name == other.name

    def __hash__(self) -> int:
        return hash((id(self.tensor), self.name))

    def __str__(self) -> str:
        return f"held({show_value(self.name)})"

    __repr__ = __str__


@dataclass(frozen=True, slots=True, repr=False)
class Random(Weight):
    """Normally distributed numbers, the same in every process: shapes without a checkpoint.

    Args:
        seed: 0 … 2⁶³ - 1.
        shape: sizes of the tensor.
        dtype: a floating-point dtype; numbers are drawn in float32 and rounded to it.
        std: standard deviation; the mean is 0.
    """

    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    std: float = 0.02

    def __post_init__(self) -> None:
        if not self.dtype.is_floating_point:
            raise GraphError(
                "random weight",
                expected="a floating-point dtype",
                found=show_value(self.dtype),
                remedy="Cast the random weight instead.",
            )
        if not (
            0 <= self.seed < 2**63 and math.isfinite(self.std) and min(self.shape, default=0) >= 0
        ):
            raise GraphError(
                "random weight",
                expected="a seed from 0 to 2**63 - 1, a finite std and sizes of at least 0",
                found=str(self),
                remedy="Correct the argument.",
            )

    def value(self) -> torch.Tensor:
        """Draw the numbers."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return (
            torch.randn(self.shape, generator=generator, device="cpu").mul_(self.std).to(self.dtype)
        )

    def __str__(self) -> str:
        values = (self.seed, self.shape, self.dtype, self.std)
        return f"random({', '.join(show_value(value) for value in values)})"

    __repr__ = __str__


@dataclass(frozen=True, slots=True, repr=False)
class Apply(Weight):
    """One operation of `WEIGHT_OPS`. Make it with `apply_weight`, which checks and infers."""

    op: str
    args: tuple[Weight | int | float, ...]
    attrs: tuple[tuple[str, AttrValue], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def value(self) -> torch.Tensor:
        """Evaluate the operands, then the operation."""
        if self.op == "concat":
            return self._concat()
        operands = [arg.value() if isinstance(arg, Weight) else arg for arg in self.args]
        return WEIGHT_OPS[self.op].function(*operands, **dict(self.attrs))

    def _concat(self) -> torch.Tensor:
        """Fill the result part by part, so that no two parts are in memory at once."""
        dim = dict(self.attrs)["dim"]
        assert isinstance(dim, int)
        result = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        start = 0
        for part in self.args:
            assert isinstance(part, Weight)
            result.narrow(dim, start, part.shape[dim]).copy_(part.value())
            start += part.shape[dim]
        return result

    def __str__(self) -> str:
        parts = [str(arg) if isinstance(arg, Weight) else show_value(arg) for arg in self.args]
        parts += [f"{name}={show_value(value)}" for name, value in self.attrs]
        return f"{self.op}({', '.join(parts)})"

    __repr__ = __str__


def apply_weight(op: str, args: tuple[Weight | int | float, ...], **attrs: AttrValue) -> Weight:
    """Apply a load-time operation to weights; nothing is loaded.

    Args:
        op: a name in `FOLDABLE`.
        args: weights, and for the arithmetic plain numbers too.
        attrs: the attributes, e.g. `dim=0` of "concat"; negative dims count from the end.

    Returns:
        The expression, with the shape and dtype that torch's broadcasting and promotion give.

    Raises:
        GraphError: an unknown operation, a wrong attribute, or shapes that do not fit.
    """
    if op not in WEIGHT_OPS:
        raise GraphError(
            f"weight operation {op!r}",
            expected=f"one of {', '.join(sorted(WEIGHT_OPS))}",
            found=repr(op),
            remedy="Keep the operation in the graph.",
        )
    schema = WEIGHT_OPS[op]
    try:
        schema.check_operands([arg if not isinstance(arg, Weight) else None for arg in args])
        rank = max((len(arg.shape) for arg in args if isinstance(arg, Weight)), default=0)
        bound = schema.bind(attrs, rank)
        operands = [(arg.shape, arg.dtype) if isinstance(arg, Weight) else arg for arg in args]
        shape, dtype = schema.infer(operands, dict(bound))
    except (TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
        shapes = [
            f"{show_value(a.dtype)}{list(a.shape)}" if isinstance(a, Weight) else repr(a)
            for a in args
        ]
        raise GraphError(
            f"weight operation {op}",
            expected=f"operands that {schema.signature} takes",
            found=f"({', '.join(shapes)}) with {attrs} ({str(error).splitlines()[0]})",
            remedy="Correct the operands or attributes.",
        ) from error
    return Apply(op, args, bound, shape, dtype)


def weight_leaves(weight: Weight) -> Iterator[Weight]:
    """Yield the Stored, Held and Random leaves of an expression, left to right, with repeats."""
    if not isinstance(weight, Apply):
        yield weight
        return
    for arg in weight.args:
        if isinstance(arg, Weight):
            yield from weight_leaves(arg)

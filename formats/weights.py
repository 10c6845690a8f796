"""Weight expressions: how a tensor of the graph is made from checkpoint tensors, as data.

A pass that merges, casts or rescales weights builds an expression and reads no tensor; tensors are
loaded once, when an engine starts or is saved. Expressions are frozen and compare by structure, and
`str()` gives text in a closed grammar:

    concat(stored("q.weight"), stored("k.weight"), dim=0)
    cast(mul(stored("w"), 0.5), dtype="bfloat16")

`weight_text.parse_weight` reads that text back, without ever executing any of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..errors import CheckpointError, GraphError
from .checkpoint import Checkpoint
from .made import Full, Random
from .weight_base import HOST, Leaf, Placement, Weight
from .weight_ggml import GGML
from .weight_heads import MAPPED
from .weight_ops import WEIGHT_OPS, AttrValue, show_value
from .weight_packed import PACKED
from .weight_quant import QUANTIZING, NotFiniteError

FOLDABLE: frozenset[str] = frozenset(WEIGHT_OPS) - {*QUANTIZING, *PACKED, *GGML, *MAPPED}
"""Names of the operations of graphs that may be applied to weights ahead of time."""


@dataclass(frozen=True, slots=True, repr=False)
class Stored(Leaf):
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

    def read(self) -> torch.Tensor:
        """Read it; CheckpointError where the file is damaged."""
        return self.checkpoint.tensor(self.name).load()

    def __str__(self) -> str:
        return f"stored({show_value(self.name)})"

    __repr__ = __str__


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Held(Leaf):
    """A tensor in memory under a name; equal to another of the same tensor object and name."""

    tensor: torch.Tensor
    name: str
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.tensor.shape))
        object.__setattr__(self, "dtype", self.tensor.dtype)

    def read(self) -> torch.Tensor:
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
class Apply(Weight):
    """One operation of `WEIGHT_OPS`. Make it with `apply_weight`, which checks and infers."""

    op: str
    args: tuple[Weight | int | float, ...]
    attrs: tuple[tuple[str, AttrValue], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def value(self, place: Placement = HOST) -> torch.Tensor:
        """Evaluate the operands on `place`, then the operation."""
        if self.op == "concat":
            out = torch.empty(self.shape, dtype=self.dtype, device=place.device)
            self.write(out, place)
            return out
        function, attrs = WEIGHT_OPS[self.op].function, dict(self.attrs)
        if self.op == "slice" and isinstance(self.args[0], Stored | Held):
            # Cut on the host, where it is a view: no more is brought than is used.
            return place.bring(function(self.args[0].read(), **attrs))
        operands = [arg.value(place) if isinstance(arg, Weight) else arg for arg in self.args]
        try:
            return function(*operands, **attrs)
        except NotFiniteError as error:
            raise _not_finite(self, str(error)) from error

    def write(self, out: torch.Tensor, place: Placement = HOST) -> None:
        """Evaluate into `out`; a concatenation part by part, so that no two are in memory."""
        for weight, region in self.pieces(out):
            if weight is self:
                region.copy_(self.value(place))
            else:
                weight.write(region, place)

    def pieces(self, out: torch.Tensor) -> Iterator[tuple[Weight, torch.Tensor]]:
        """One piece a part of a concatenation; a cast goes along with the writing."""
        if self.op == "concat":
            dim, start = dict(self.attrs)["dim"], 0
            assert isinstance(dim, int)
            for part in self.args:
                assert isinstance(part, Weight)
                size = part.shape[dim]
                yield from part.pieces(out.narrow(dim, start, size))
                start += size
        elif self.op == "cast" and out.dtype == self.dtype:
            # Into another dtype it would be left out, and its rounding with it.
            (operand,) = self.args
            assert isinstance(operand, Weight)
            yield from operand.pieces(out)
        else:
            yield self, out

    def __str__(self) -> str:
        parts = [str(arg) if isinstance(arg, Weight) else show_value(arg) for arg in self.args]
        parts += [f"{name}={show_value(value)}" for name, value in self.attrs]
        return f"{self.op}({', '.join(parts)})"

    __repr__ = __str__


def apply_weight(op: str, args: tuple[Weight | int | float, ...], **attrs: AttrValue) -> Weight:
    """Apply a load-time operation to weights; nothing is loaded.

    Args:
        op: a name in `WEIGHT_OPS`.
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
    """Yield the leaves of an expression (all but Apply), left to right, with repeats."""
    if not isinstance(weight, Apply):
        yield weight
        return
    for arg in weight.args:
        if isinstance(arg, Weight):
            yield from weight_leaves(arg)


def _not_finite(weight: Weight, found: str) -> CheckpointError:
    """The error of a weight that cannot be quantized; it names the tensor."""
    leaves = list(dict.fromkeys(weight_leaves(weight)))
    guilty = [
        leaf for leaf in leaves if not bool(torch.isfinite(leaf.value().float()).all())
    ] or leaves
    return CheckpointError(
        f"weight {', '.join(map(str, guilty))}",
        expected="finite numbers, which have codes to be quantized to",
        found=found,
        remedy="Restore the tensor, or keep its product as it is: QuantConfig(skip=(PATTERN,)).",
    )


__all__ = [
    "FOLDABLE",
    "Apply",
    "Full",
    "Held",
    "Random",
    "Stored",
    "Weight",
    "apply_weight",
    "weight_leaves",
]

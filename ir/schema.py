"""Op schemas: one object an op, for the interpreter, verifier, tests, roofline and benchmarks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias

import torch

from ..errors import GraphError
from .dims import Size, is_nonnegative
from .dtypes import DType
from .node import Attr, Node
from .types import TensorType, ValueType

Tensors: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"
Infer: TypeAlias = Callable[..., ValueType]
Reference: TypeAlias = Callable[..., Tensors]


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs and bytes moved by one call, symbolic where the shapes are."""

    flops: Size
    bytes: Size


@dataclass(frozen=True, slots=True)
class Sample:
    """One example call: operands by position (None: absent) and attributes."""

    args: tuple[torch.Tensor | None, ...]
    attrs: Mapping[str, Attr] = field(default_factory=dict)


Samples: TypeAlias = Callable[[torch.Generator], Sequence[Sample]]

# (relative, absolute) against a float64 reference, after a handful of roundings in that type.
TOLERANCE: Mapping[DType, tuple[float, float]] = {
    DType.F64: (1e-12, 1e-12),
    DType.F32: (2e-5, 2e-5),
    DType.F16: (4e-3, 4e-3),
    DType.BF16: (3e-2, 3e-2),
}


@dataclass(frozen=True, slots=True)
class OpSchema:
    """What an op is.

    Attributes:
        name: its name in IR text.
        operands: operand names; a trailing ``*name`` takes any number, ``name?`` may be absent.
        attrs: the attributes it knows; ``infer``'s keyword defaults are theirs.
        infer: ``infer(*operand_types, **attrs)`` gives the result type, GraphError when ill-typed.
        reference: ``reference(*tensors, **attrs)`` in torch, the definition of the op. Sizes in
            attrs are ints there.
        flops: FLOPs from operand types, attributes and the result type; 0 for data movement.
        samples: example calls for tests and benchmarks.
        elementwise: every result element depends on the operand elements of the same (broadcast)
            index alone.
        aliases: (result index, operand index) pairs written in place by kernels.
        tolerance: (relative, absolute) by dtype for comparison with float64.
        moved: bytes moved, where that is not every operand and every result once.
    """

    name: str
    operands: tuple[str, ...]
    infer: Infer
    reference: Reference
    attrs: tuple[str, ...] = ()
    flops: Callable[[Node], Size] = lambda node: 0
    samples: Samples = lambda generator: ()
    elementwise: bool = False
    aliases: tuple[tuple[int, int], ...] = ()
    tolerance: Mapping[DType, tuple[float, float]] = field(default_factory=lambda: TOLERANCE)
    moved: Callable[[Node], Size] | None = None

    def cost(self, node: Node) -> Cost:
        """FLOPs of the call, and bytes when each operand is read and each result written once."""
        if self.moved is not None:
            return Cost(self.flops(node), self.moved(node))
        moved: Size = 0
        for operand in dict.fromkeys(node.operands):
            for operand_type in operand.types:
                moved = moved + operand_type.nbytes
        for result in node.types:
            moved = moved + result.nbytes
        return Cost(self.flops(node), moved)


_registry: dict[str, OpSchema] = {}


def register(op: OpSchema) -> OpSchema:
    """Enters a schema under its name; each name once."""
    assert op.name not in _registry, op.name
    _registry[op.name] = op
    return op


def schema(name: str) -> OpSchema:
    """The schema called ``name``; GraphError listing the names there are when there is none."""
    from . import ops  # noqa: F401  the op families register themselves when first asked for

    if name not in _registry:
        raise GraphError(
            f"op {name!r}",
            expected=f"one of {', '.join(sorted(_registry))}",
            found="no such op",
            remedy="Correct the name, or add its schema under ir/ops/.",
        )
    return _registry[name]


def all_schemas() -> tuple[OpSchema, ...]:
    """Every op, by name."""
    schema("input")
    return tuple(_registry[name] for name in sorted(_registry))


@cache
def attr_defaults(name: str) -> Mapping[str, Attr]:
    """The attributes that ``make`` fills in for an op, so that equal calls are equal nodes."""
    parameters = inspect.signature(schema(name).infer).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty and p.default is not None
    }


def infer_type(
    spec: OpSchema, types: Sequence[ValueType | None], attrs: Mapping[str, Attr]
) -> ValueType:
    """The result type of a call; GraphError whatever is wrong with its operands or attributes."""
    if spec.name != "item" and any(isinstance(t, tuple) for t in types):
        raise GraphError(
            spec.name,
            expected="operands with one result each",
            found=", ".join(map(str, types)),
            remedy="Pick one with item(node, index).",
        )
    try:
        result = spec.infer(*types, **attrs)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise GraphError(
            spec.name,
            expected=f"operands ({', '.join(spec.operands)}), attributes ({', '.join(spec.attrs)})",
            found=f"({', '.join(map(str, types))}), {dict(attrs)}: {error}",
            remedy="Give the op what its schema declares.",
        ) from error
    for result_type in (result,) if isinstance(result, TensorType) else result:
        if any(is_nonnegative(-1 - size) for size in result_type.shape):
            raise ill_typed(spec.name, f"no negative size in {result_type}")
    return result


def ill_typed(op: str, expected: str, *types: TensorType | None) -> GraphError:
    """The error that an ``infer`` raises."""
    found = ", ".join("None" if t is None else str(t) for t in types) or "one"
    return GraphError(op, expected=expected, found=found, remedy="Check the operands' types.")

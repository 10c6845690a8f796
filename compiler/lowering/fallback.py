"""Calls without a rule: ``aten`` nodes that run as torch defines them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...errors import CaptureError
from ...ir.build import item, make
from ...ir.dims import Dim
from ...ir.dtypes import DType
from ...ir.node import Attr, Node
from ...ir.types import TensorType
from .base import Result, Value

# The IR has no strides, so what is a view in the module must be allowed to copy here.
_COPYING = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
}
_SKIPPED = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "generator")


def aten_call(
    target: torch._ops.OpOverload,
    args: Sequence[Value],
    kwargs: Mapping[str, Value],
    results: tuple[TensorType | None, ...],
    where: str,
) -> Result:
    """The call as an ``aten`` node.

    Raises:
        CaptureError: an op that draws random numbers or writes to its operands, arguments or
            results that are neither tensors nor numbers.
    """
    _check(target, where)
    types = tuple(result for result in results if result is not None)
    if len(types) != len(results) or not types:
        raise _refused(where, "an op whose results are tensors", str(target))
    operands: list[Node] = []
    positional = tuple(_encode(arg, operands, where) for arg in args)
    named = tuple(
        (name, _encode(arg, operands, where))
        for name, arg in sorted(kwargs.items())
        if name not in _SKIPPED
    )
    text = _COPYING.get(str(target), str(target))
    node = make("aten", *operands, target=text, positional=positional, named=named, types=types)
    if len(types) == 1:
        return node
    return tuple(item(node, i) for i in range(len(types)))


def _check(target: torch._ops.OpOverload, where: str) -> None:
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise CaptureError(
            where,
            expected="a module that draws no random numbers in eval mode",
            found=str(target),
            remedy="Draw the numbers outside the module, and pass them in.",
        )
    if target._schema.is_mutable:
        raise _refused(where, "an op that returns its result", f"{target}, which writes in place")


def _encode(value: Value, operands: list[Node], where: str) -> tuple[Attr, ...]:
    match value:
        case None:
            return ("n",)
        case Node():
            if value not in operands:
                operands.append(value)
            return ("t", operands.index(value))
        case list() | tuple():
            return ("l", *(_encode(element, operands, where) for element in value))
        case torch.dtype():
            return ("v", DType.from_torch(value))
        case torch.device():
            return ("v", value.type)
        case bool() | int() | float() | str() | Dim():
            return ("v", value)
    raise _refused(where, "arguments that are tensors, sizes or numbers", type(value).__name__)


def _refused(where: str, expected: str, found: str) -> CaptureError:
    return CaptureError(
        where,
        expected=expected,
        found=found,
        remedy="Write that part of the module with other ops.",
    )

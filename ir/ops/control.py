"""Ops that hold graphs or foreign calls: fused, cond, and aten, the call that runs as torch defines it."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch

from ...errors import GraphError
from ..dims import Size
from ..graph import Graph
from ..node import Node
from ..schema import OpSchema, register, schema
from ..types import TensorType, ValueType


def body_of(node: Node, name: str = "body") -> Graph:
    """The graph that a node holds in an attribute."""
    body = node.attr(name)
    assert isinstance(body, Graph), f"{node.op} without {name}"
    return body


def _results(body: Graph) -> ValueType:
    types = tuple(output.type for output in body.outputs)
    return types[0] if len(types) == 1 else types


def _check_call(op: str, body: Graph, operands: tuple[TensorType, ...]) -> None:
    wanted = tuple(node.type for node in body.inputs)
    if operands != wanted:
        raise GraphError(
            f"{op} {body.name}",
            expected=f"operands ({', '.join(map(str, wanted))})",
            found=f"({', '.join(map(str, operands))})",
            remedy="Call the body with what it declares.",
        )


def _fused_type(*operands: TensorType, body: Graph, kind: str) -> ValueType:
    _check_call("fused", body, operands)
    return _results(body)


def _run(
    body: Graph, operands: tuple[torch.Tensor, ...]
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    from ..interpreter import interpret

    results = interpret(body, operands)
    return results[0] if len(results) == 1 else results


def _fused_flops(node: Node) -> Size:
    costs = [schema(inner.op).flops(inner) for inner in body_of(node).calls()]
    return reduce(lambda a, b: a + b, costs, 0)


def _cond_type(
    predicate: TensorType, *operands: TensorType, then: Graph, otherwise: Graph
) -> ValueType:
    _check_call("cond", then, operands)
    _check_call("cond", otherwise, operands)
    if _results(then) != _results(otherwise):
        raise GraphError(
            f"cond {then.name} / {otherwise.name}",
            expected="branches of one result type",
            found=f"{_results(then)} and {_results(otherwise)}",
            remedy="Make the branches return the same shapes and element types.",
        )
    return _results(then)


def _cond(
    predicate: torch.Tensor, *operands: torch.Tensor, then: Graph, otherwise: Graph
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return _run(then if bool(predicate) else otherwise, operands)


def resolve_aten(target: str) -> torch._ops.OpOverload:
    """The overload named ``namespace.name.overload``; GraphError when the installed torch has none."""
    namespace, name, overload = target.split(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload, None) if packet is not None else None
    if not isinstance(found, torch._ops.OpOverload):
        raise GraphError(
            target,
            expected="an operator of the installed torch",
            found=f"none in torch {torch.__version__}",
            remedy="Install the torch release that the graph was captured with.",
        )
    return found


def _aten_type(
    *operands: TensorType,
    target: str,
    positional: object,
    named: object,
    types: tuple[TensorType, ...],
) -> ValueType:
    return types[0] if len(types) == 1 else types


def decode_argument(spec: Any, operands: tuple[torch.Tensor, ...]) -> Any:
    """The Python argument that ``spec`` stands for: ("t", i) operand i, ("l", …) a list, ("v", x) a value."""
    tag, *rest = spec
    if tag == "t":
        return operands[rest[0]]
    if tag == "l":
        return [decode_argument(element, operands) for element in rest]
    if tag == "n":
        return None
    return rest[0] if not hasattr(rest[0], "torch") else rest[0].torch


def _aten(
    *operands: torch.Tensor, target: str, positional: Any, named: Any, types: object
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    args = [decode_argument(spec, operands) for spec in positional]
    kwargs = {name: decode_argument(spec, operands) for name, spec in named}
    result = resolve_aten(target)(*args, **kwargs)
    return tuple(result) if isinstance(result, list | tuple) else result


FUSED = register(
    OpSchema(
        "fused",
        ("*operands",),
        _fused_type,
        lambda *operands, body, kind: _run(body, operands),
        ("body", "kind"),
        _fused_flops,
    )
)
COND = register(
    OpSchema("cond", ("predicate", "*operands"), _cond_type, _cond, ("then", "otherwise"))
)
ATEN = register(
    OpSchema("aten", ("*operands",), _aten_type, _aten, ("target", "positional", "named", "types"))
)

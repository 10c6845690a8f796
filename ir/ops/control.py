"""Ops that hold graphs or foreign calls: fused, cond, and aten, which runs as torch defines it."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import GraphError
from ..dims import Size, call, total
from ..dtypes import DType
from ..graph import Graph
from ..node import Attr, Node
from ..schema import OpSchema, ill_typed, register, schema
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


ROLES = ("epilogue", "prologue")


def _fused_type(
    *operands: TensorType, body: Graph, kind: str, roles: tuple[str, ...] | None = None
) -> ValueType:
    if not set(roles or ()) <= set(ROLES):
        raise ValueError(f"roles are among {ROLES}")
    _check_call("fused", body, operands)
    return _results(body)


def _run(
    body: Graph, operands: tuple[torch.Tensor, ...]
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    from ..interpreter import interpret

    results = interpret(body, operands)
    return results[0] if len(results) == 1 else results


def _fused_flops(node: Node) -> Size:
    return _body_flops(body_of(node))


def _fused_bytes(node: Node) -> Size:
    """Results once; of each operand what the body loads: all of it, or the parts that it picks."""
    body = body_of(node)
    moved = total(value_type.nbytes for value_type in node.types)
    for operand in body.inputs:
        readers = body.users[operand]
        picked = all(r.op in _PICKS and r.operands[_PICKS[r.op]] is operand for r in readers)
        loads = readers if picked and operand not in body.outputs else (operand,)
        moved = moved + total(load.type.nbytes for load in loads)
    return moved


_PICKS = {"slice": 0, "embedding": 0, "index_select": 0}  # op: the operand of which it reads a part


def _body_flops(body: Graph) -> Size:
    return total(schema(inner.op).flops(inner) for inner in body.calls())


def _cond_flops(node: Node) -> Size:
    """Those of the dearer branch."""
    return call("max", *(_body_flops(body_of(node, name)) for name in ("then", "otherwise")))


def _cond_type(
    predicate: TensorType, *operands: TensorType, then: Graph, otherwise: Graph
) -> ValueType:
    if predicate != TensorType(DType.BOOL, ()):
        raise ill_typed("cond", "a predicate bool[()]", predicate)
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
    """The overload named ``namespace.name.overload`` of the installed torch.

    Raises:
        GraphError: there is none, or it writes to its operands, which are values here.
    """
    parts = target.split(".")
    found: object = torch.ops if len(parts) == 3 else None
    for part in parts:
        found = getattr(found, part, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise GraphError(
            target,
            expected="an operator namespace.name.overload of the installed torch",
            found=f"none in torch {torch.__version__}",
            remedy="Install the torch release that the graph was captured with.",
        )
    if found._schema.is_mutable:
        raise GraphError(
            target,
            expected="an operator without side effects",
            found=str(found._schema),
            remedy="Functionalise the module before lowering it.",
        )
    return found


def _aten_type(
    *operands: TensorType,
    target: str,
    positional: tuple[Attr, ...],
    named: tuple[tuple[str, Attr], ...],
    types: tuple[TensorType, ...],
) -> ValueType:
    for spec in positional:
        _check_argument(spec, len(operands))
    for spec in dict(named).values():
        _check_argument(spec, len(operands))
    if not types or not isinstance(target, str):
        raise ValueError("types holds at least one, target is a string")
    return types[0] if len(types) == 1 else types


def _check_argument(spec: Any, count: int) -> None:
    tag, *rest = spec
    if tag == "l":
        for element in rest:
            _check_argument(element, count)
    elif (tag, len(rest)) not in (("t", 1), ("n", 0), ("v", 1)):
        raise ValueError(f'argument {spec}: not ("t", i), ("l", ...), ("v", x) or ("n",)')
    elif tag == "t" and not 0 <= rest[0] < count:
        raise ValueError(f"argument {spec}: there are {count} operands")


def decode_argument(spec: Any, operands: tuple[torch.Tensor, ...]) -> Any:
    """The Python argument that ``spec`` stands for.

    ``("t", i)`` is operand i, ``("l", ...)`` a list of such specs, ``("n",)`` None, and
    ``("v", x)`` the value x, where a ``DType`` stands for the torch dtype.
    """
    tag, *rest = spec
    if tag == "t":
        return operands[rest[0]]
    if tag == "l":
        return [decode_argument(element, operands) for element in rest]
    if tag == "n":
        return None
    return rest[0].torch if isinstance(rest[0], DType) else rest[0]


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
        lambda *operands, body, kind, roles=None: _run(body, operands),
        ("body", "kind", "roles"),
        _fused_flops,
        moved=_fused_bytes,
    )
)
COND = register(
    OpSchema(
        "cond",
        ("predicate", "*operands"),
        _cond_type,
        _cond,
        ("then", "otherwise"),
        _cond_flops,
    )
)
ATEN = register(
    OpSchema("aten", ("*operands",), _aten_type, _aten, ("target", "positional", "named", "types"))
)

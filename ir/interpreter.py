"""The reference interpreter: each node by its schema's reference, each value freed after use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import GraphError
from .dims import Dim, evaluate, solve
from .graph import Graph, param_name
from .node import Attr, Node
from .schema import schema
from .types import TensorType

Value = torch.Tensor | tuple[torch.Tensor, ...]


def interpret(
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor] | None = None,
    watch: Callable[[Node, Value], None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Runs a graph on tensors.

    Args:
        graph: what to run.
        inputs: one tensor an input, in order; symbols are bound from their shapes.
        weights: values of params by name; those not given are loaded from ``graph.weights`` when
            first needed, once, and dropped after their last use.
        watch: called with each node and its value.

    Returns:
        One tensor an output.

    Raises:
        GraphError: an input or weight whose shape or element type does not fit, or an op whose
            result is not of the type that its node declares.
    """
    bindings = bind_symbols(graph, inputs)
    values: dict[Node, Value] = dict(zip(graph.inputs, inputs, strict=True))
    last_use = last_uses(graph)
    for node in graph.nodes:
        if node.op == "param":
            values[node] = _weight(graph, node, weights)
        elif node.op != "input":
            operands = [None if arg is None else values[arg] for arg in node.args]
            values[node] = schema(node.op).reference(*operands, **resolve_attrs(node, bindings))
            _check_result(graph, node, values[node], bindings)
        if watch is not None:
            watch(node, values[node])
        for dead in last_use.get(node, ()):
            del values[dead]
    return tuple(_tensor(values[output]) for output in graph.outputs)


def bind_symbols(graph: Graph, inputs: Sequence[torch.Tensor]) -> dict[str, int]:
    """Values of the symbols from the inputs' shapes, checked against every input's type."""
    if len(inputs) != len(graph.inputs):
        raise GraphError(
            graph.name,
            expected=f"{len(graph.inputs)} inputs",
            found=str(len(inputs)),
            remedy="Give one tensor an input.",
        )
    bindings: dict[str, int] = {}
    for node, tensor in zip(graph.inputs, inputs, strict=True):
        if len(node.shape) != tensor.dim() or node.dtype.torch is not tensor.dtype:
            raise _misfit(graph, node, tensor)
        for size, actual in zip(node.shape, tensor.shape, strict=True):
            found = solve(size, actual)
            if found is not None:
                bindings.setdefault(*found)
    for node, tensor in zip(graph.inputs, inputs, strict=True):
        wanted = tuple(evaluate(size, bindings) for size in node.shape)
        if wanted != tuple(tensor.shape):
            raise _misfit(graph, node, tensor)
    return bindings


def resolve_attrs(node: Node, bindings: Mapping[str, int]) -> dict[str, Any]:
    """A node's attributes with every symbolic size replaced by its value."""
    return {name: resolve_attr(value, bindings) for name, value in node.attrs}


def resolve_attr(value: Attr, bindings: Mapping[str, int]) -> Any:
    """One attribute with every symbolic size replaced by its value."""
    if isinstance(value, Dim):
        return evaluate(value, bindings)
    if isinstance(value, tuple):
        return tuple(resolve_attr(element, bindings) for element in value)
    return value


def _weight(graph: Graph, node: Node, weights: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    name = param_name(node)
    if weights is not None and name in weights:
        value = weights[name]
    elif name in graph.weights:
        value = graph.weights[name].load()
    else:
        raise _wrong(f"param {name!r} of {graph.name}", str(node.type), "no weight")
    if not _fits(node.type, value, {}):
        raise _wrong(f"param {name!r} of {graph.name}", str(node.type), _described(value))
    return value


def _check_result(graph: Graph, node: Node, value: Value, bindings: Mapping[str, int]) -> None:
    results = value if isinstance(value, tuple) else (value,)
    fits = len(results) == len(node.types) and all(
        _fits(declared, result, bindings)
        for declared, result in zip(node.types, results, strict=True)
    )
    if not fits:
        found = ", ".join(map(_described, results))
        raise _wrong(f"{node} in {graph.name}", f"{node.value_type} with {dict(bindings)}", found)


def _fits(declared: TensorType, value: torch.Tensor, bindings: Mapping[str, int]) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype is declared.dtype.torch
        and value.dim() == declared.rank
        and all(
            evaluate(d, bindings) == s for d, s in zip(declared.shape, value.shape, strict=True)
        )
    )


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def last_uses(graph: Graph) -> dict[Node, list[Node]]:
    """For each node the values that nobody needs after it; outputs are needed to the end."""
    kept, last = set(graph.outputs), dict[Node, Node]()
    for node in graph.nodes:
        for operand in node.operands:
            last[operand] = node
    dead: dict[Node, list[Node]] = {}
    for value, user in last.items():
        if value not in kept:
            dead.setdefault(user, []).append(value)
    return dead


def _tensor(value: Value) -> torch.Tensor:
    assert isinstance(value, torch.Tensor), "an output has one result"
    return value


def _misfit(graph: Graph, node: Node, tensor: torch.Tensor) -> GraphError:
    return _wrong(
        f"input {node.attr('name')!r} of {graph.name}", str(node.type), _described(tensor)
    )


def _wrong(culprit: str, expected: str, found: str) -> GraphError:
    return GraphError(
        culprit,
        expected=expected,
        found=found,
        remedy="Give tensors of the declared types; sizes of one name must be equal.",
    )

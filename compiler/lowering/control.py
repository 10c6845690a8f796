"""Control flow: torch.cond becomes ``cond`` with its branches as graphs; loops are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ...errors import CaptureError
from ...ir.build import cast, input_node, item, make
from ...ir.dtypes import DType
from ...ir.graph import Graph
from ...ir.node import Node
from ..capture_clean import inline_contexts, op_name, where
from .base import Value
from .shape import expand

if TYPE_CHECKING:
    from .lower import Lowering


def lower_cond(outer: Lowering, node: fx.Node) -> Value:
    """torch.cond(predicate, then, otherwise, operands) → the tuple of its results."""
    predicate = outer.value(node.args[0])
    operands = [outer.value(argument) for argument in node.args[3]]  # type: ignore[union-attr]
    if not isinstance(predicate, Node):
        raise _refused(node, "a predicate that is a tensor", "one on sizes")
    tensors = [value for value in operands if isinstance(value, Node)]
    index, outer.bodies = outer.bodies, outer.bodies + 1
    bodies = [
        _branch(outer, argument, f"{outer.name}_{stem}_{index}", operands, node)
        for stem, argument in zip(("then", "otherwise"), node.args[1:3], strict=True)
    ]
    flag = (
        make("reshape", cast(predicate, DType.BOOL), shape=())
        if predicate.shape
        else cast(predicate, DType.BOOL)
    )
    then, otherwise = bodies
    call = make("cond", flag, *tensors, then=then, otherwise=otherwise)
    count = len(then.outputs)
    return (call,) if count == 1 else tuple(item(call, i) for i in range(count))


def _branch(
    outer: Lowering, argument: object, name: str, operands: list[Value], node: fx.Node
) -> Graph:
    from .lower import Lowering, as_output

    module = outer.value(argument)
    assert isinstance(module, fx.GraphModule)
    inline_contexts(module)
    placeholders = module.graph.find_nodes(op="placeholder")
    values: dict[str, Value] = {}
    inputs: list[Node] = []
    for i, (placeholder, operand) in enumerate(zip(placeholders, operands, strict=True)):
        if isinstance(operand, Node):
            inputs.append(input_node(f"x{i}", operand.type))
            values[placeholder.name] = inputs[-1]
        else:
            values[placeholder.name] = operand
    results = Lowering(module, outer.sizes, name).run(values)
    declared = outer.types(node)
    outputs = [
        expand(as_output(value), wanted.shape) if wanted is not None else as_output(value)
        for value, wanted in zip(results, declared, strict=True)
    ]
    return Graph(name, tuple(inputs), tuple(outputs))


def refuse_operator(node: fx.Node) -> CaptureError:
    """The error for a higher-order operator without a lowering."""
    return _refused(node, "tensor ops and torch.cond", op_name(node))


def _refused(node: fx.Node, expected: str, found: str) -> CaptureError:
    return CaptureError(
        f"{node.name} in {where(node)}",
        expected=expected,
        found=found,
        remedy="Unroll it, or use torch.compile(model, backend='tilewright'), which breaks the "
        "graph there.",
    )

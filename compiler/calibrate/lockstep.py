"""All samples through a graph in step: each node on every sample before the next node.

So memory holds the live values of one place in the graph, which is one layer's activations, and one
weight at a time; and what a layer's codes cost is seen by the layers behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import torch

from ...errors import VerificationError
from ...ir.graph import Graph, param_name
from ...ir.interpreter import Value, bind_symbols, last_uses, resolve_attrs
from ...ir.node import Node
from ...ir.schema import schema

Observe: TypeAlias = Callable[[str, torch.Tensor, torch.Tensor], "torch.Tensor | None"]
"""(name of a weight, its inputs [tokens, K], the weight [N, K]) -> the weight to go on with, None
for the same."""


def run_in_step(
    graph: Graph,
    samples: Sequence[Sequence[torch.Tensor]],
    names: Collection[str],
    observe: Observe,
    advance: Callable[[float], None] = lambda share: None,
) -> None:
    """Runs a graph up to the last linear of interest.

    Args:
        graph: what to run.
        samples: one tensor an input of the graph, for each sample.
        names: of the weights whose linears are of interest, each read by linears alone.
        observe: called for the first linear of each of these weights.
        advance: called with the share that is done.

    Raises:
        VerificationError: an input or a weight of such a linear that is NaN or infinite.
    """
    nodes = _needed(graph, names)
    dead = last_uses(graph)
    bindings = [bind_symbols(graph, inputs) for inputs in samples]
    values: list[dict[Node, Value]] = [
        dict(zip(graph.inputs, inputs, strict=True)) for inputs in samples
    ]
    shared: dict[Node, torch.Tensor] = {}
    with torch.no_grad():
        for done, node in enumerate(nodes):
            if node.op == "param":
                continue
            for operand in node.operands:
                if operand.op == "param" and operand not in shared:
                    shared[operand] = graph.weights[param_name(operand)].load()
                    _observed(node, operand, shared, values, names, observe)
            if node.op != "input":
                for binding, own in zip(bindings, values, strict=True):
                    operands = [
                        None if a is None else shared[a] if a.op == "param" else own[a]
                        for a in node.args
                    ]
                    own[node] = schema(node.op).reference(*operands, **resolve_attrs(node, binding))
            for value in dead.get(node, ()):
                shared.pop(value, None)
                for own in values:
                    own.pop(value, None)
            advance((done + 1) / len(nodes))


def _needed(graph: Graph, names: Collection[str]) -> Sequence[Node]:
    """The nodes up to the last linear of interest."""
    last = 0
    for index, node in enumerate(graph.nodes):
        if node.op == "linear" and node.operands[1].op == "param":
            last = index + 1 if param_name(node.operands[1]) in names else last
    return graph.nodes[:last]


def _observed(
    node: Node,
    weight: Node,
    shared: dict[Node, torch.Tensor],
    values: Sequence[dict[Node, Value]],
    names: Collection[str],
    observe: Observe,
) -> None:
    name = param_name(weight)
    if name not in names or node.op != "linear" or node.operands[1] is not weight:
        return
    inputs = [own[node.operands[0]] for own in values]
    rows = torch.cat([x.flatten(0, -2) for x in inputs if isinstance(x, torch.Tensor)])
    if not bool(torch.isfinite(shared[weight]).all()):
        raise VerificationError(
            f"the weight {name!r} in calibration",
            expected="finite numbers",
            found="NaN or an infinity",
            remedy="Check the checkpoint: no code stands for these.",
        )
    if not bool(torch.isfinite(rows).all()):
        raise VerificationError(
            f"the input of {name!r} in calibration",
            expected="finite numbers",
            found="NaN or an infinity",
            remedy="Check the model in float32: its activations overflow.",
        )
    changed = observe(name, rows, shared[weight])
    if changed is not None:
        shared[weight] = changed.to(shared[weight].dtype)

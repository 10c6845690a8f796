"""A quantized graph for runs that are many: its weights in numbers, made once."""

from __future__ import annotations

import torch

from ...formats.weights import Held
from ...ir.build import cast, make, param, rebuild
from ...ir.dtypes import DType
from ...ir.graph import Graph, Weight, param_name
from ...ir.interpreter import interpret
from ...ir.node import Node


def with_dense_weights(graph: Graph) -> Graph:
    """The graph with each ``dequantize`` of params done once, and ``scaled_linear`` of whole rows
    as a product of what the codes stand for, in float32: the same but for the order of sums.
    """
    values: dict[Node, Node] = {}
    dense: dict[str, Weight] = {}
    for node in graph.nodes:
        values[node] = rebuild(node, values)
        if node.op == "dequantize" and all(operand.op == "param" for operand in node.operands):
            values[node] = _held(node, graph, dense)
        elif node.op == "scaled_linear" and _is_plain(node):
            values[node] = _product(node, values, graph, dense)
    outputs = tuple(values[output] for output in graph.outputs)
    return graph.with_weights(dense).with_outputs(outputs)


def _held(weight: Node, graph: Graph, dense: dict[str, Weight]) -> Node:
    name = f"{param_name(weight.operands[0])}.dense"
    with torch.no_grad():
        value = interpret(Graph("weight", (), (weight,), graph.weights), ())[0]
    dense[name] = Held(value, name)
    return param(name, weight.type)


def _is_plain(node: Node) -> bool:
    """Whether x has one scale a row, or one in all, and sums of float32 will do."""
    codes = all(operand.op == "param" for operand in node.operands[2:4])
    return codes and not node.attr("group") and node.dtype is not DType.F64


def _product(node: Node, values: dict[Node, Node], graph: Graph, dense: dict[str, Weight]) -> Node:
    x, x_scale, codes, scale, bias = node.args
    assert x is not None and x_scale is not None and codes is not None
    whole = make("dequantize", codes, scale, dtype=DType.F32, rows=node.attr("rows"), group=0)
    rows = make("mul", cast(values[x], DType.F32), cast(values[x_scale], DType.F32))
    wide = None if bias is None else cast(values[bias], DType.F32)
    return cast(make("linear", rows, _held(whole, graph, dense), wide), node.dtype)

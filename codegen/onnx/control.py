"""Ops that hold graphs: fused bodies are written out in place, conditions become If."""

from __future__ import annotations

from onnx import GraphProto, helper

from ...ir.graph import Graph
from ...ir.node import Node
from ...ir.ops.control import body_of
from .emitter import Converter, Emitter, Names, Refusal, value_info


def _inner(e: Emitter, body: Graph, operands: tuple[str, ...]) -> Emitter:
    inner = Emitter(body, {}, (), e.convert, e.max_len, e.shared)
    inner.stem = e.stem
    inner.values = {node: (name,) for node, name in zip(body.inputs, operands, strict=True)}
    inner.sources = e.sources
    return inner


def _convert(inner: Emitter) -> Refusal | None:
    for node in inner.graph.calls():
        refusal = inner.emit(node)
        if refusal is not None:
            return Refusal(f"{node.op} within: {refusal.reason}")
    return None


def _fused(e: Emitter, node: Node, *operands: str) -> Names | Refusal:
    body = body_of(node)
    inner = _inner(e, body, operands)
    inner.nodes = e.nodes
    refusal = _convert(inner)
    if refusal is not None:
        return refusal
    names = tuple(inner.value(output) for output in body.outputs)
    # A result that is an operand, or twice the same, still needs a name of its own.
    names = tuple(
        e.op("Identity", name) if name in operands or name in names[:i] else name
        for i, name in enumerate(names)
    )
    return names[0] if len(names) == 1 else names


def _cond(
    e: Emitter, node: Node, predicate: str, *operands: str
) -> str | tuple[str, ...] | Refusal:
    branches: dict[str, GraphProto] = {}
    for attr, name in (("then_branch", "then"), ("else_branch", "otherwise")):
        branch = _branch(e, body_of(node, name), operands)
        if isinstance(branch, Refusal):
            return branch
        branches[attr] = branch
    names = e.ops("If", predicate, count=len(node.types), **branches)
    return names[0] if len(names) == 1 else names


def _branch(e: Emitter, body: Graph, operands: tuple[str, ...]) -> GraphProto | Refusal:
    """A branch takes nothing: it reads the enclosing graph's values by name."""
    inner = _inner(e, body, operands)
    refusal = _convert(inner)
    if refusal is not None:
        return refusal
    infos = []
    for output in body.outputs:
        name = inner.op("Identity", inner.value(output))
        infos.append(value_info(name, output.type))
    return helper.make_graph(inner.nodes, body.name, [], infos)


CONVERTERS: dict[str, Converter] = {"fused": _fused, "cond": _cond}

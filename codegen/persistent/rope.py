"""Reads the group that makes cos and sin of positions, however the capture spelled it."""

from __future__ import annotations

from collections.abc import Mapping

from ...ir.dtypes import DType
from ...ir.graph import input_name
from ...ir.node import Node
from ...ir.ops.control import body_of
from ..triton.layout import VIEWS

_MOVES = VIEWS - {"slice"}
"""Views that keep all elements."""


def frequencies_of(node: Node) -> Node | None:
    """The parameter f32[D / 2] of a group that gives bfloat16 cos and sin [B, D / 2] of positions
    times frequencies; None if ``node`` is another call.

    Which side of the product stands first, and whether positions are cast within the group or
    before it, differs between releases of transformers.
    """
    if node.op != "fused" or node.attr("kind") == "linear" or len(node.types) != 2:
        return None
    body = body_of(node)
    outer = dict(zip(body.inputs, node.operands, strict=True))
    angles = [_angle(out, name) for out, name in zip(body.outputs, ("cos", "sin"), strict=True)]
    angle = angles[0]
    if angle is None or angle is not angles[1] or angle.op != "mul" or len(angle.operands) != 2:
        return None
    left, right = (_origin(side, outer) for side in angle.operands)
    frequencies, positions = (left, right) if left.op == "param" else (right, left)
    known = frequencies.op == "param" and frequencies.dtype is DType.F32
    shape = node.types[0].shape
    if not known or not _is_positions(positions) or frequencies.shape != shape[-1:]:
        return None
    return frequencies


def is_cast_of_positions(node: Node) -> bool:
    """Whether it is a float32 of each position, which a group of cos and sin takes in."""
    return len(node.types) == 1 and node.dtype is DType.F32 and _is_positions(_origin(node, {}))


def _angle(out: Node, function: str) -> Node | None:
    """What ``function`` is taken of, where ``out`` is that rounded to bfloat16."""
    if out.op != "cast" or out.dtype is not DType.BF16:
        return None
    (inner,) = out.operands
    if inner.op != function or inner.dtype is not DType.F32:
        return None
    return inner.operands[0]


def _origin(node: Node, outer: Mapping[Node, Node]) -> Node:
    """Where a value comes from: through views that keep all elements, casts to float32 and groups
    of nothing else.
    """
    while True:
        if node in outer:
            node = outer[node]
        elif node.op in _MOVES or (node.op == "cast" and node.dtype is DType.F32):
            node = node.operands[0]
        elif node.op == "fused" and node.attr("kind") != "linear" and len(node.types) == 1:
            body = body_of(node)
            inside = dict(zip(body.inputs, node.operands, strict=True))
            found = _origin(body.outputs[0], {})
            if found not in inside:
                return node
            node = inside[found]
        else:
            return node


def _is_positions(node: Node) -> bool:
    integers = {DType.I64, DType.I32}
    return node.op == "input" and node.dtype in integers and input_name(node) == "positions"

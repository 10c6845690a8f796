"""Norms, gated activations and rotary embedding as ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...ir.dtypes import DType
from ...ir.node import Node
from ..constants import is_constant
from .elementwise import CONVERTERS as ELEMENTWISE
from .emitter import ELEMENT_TYPES, MICROSOFT, Converter, Emitter, Refusal, numpy_type


def _add(e: Emitter, node: Node, a: str, b: str) -> str | Refusal:
    norm = _norm_of(e, node)
    if norm is None:
        found = ELEMENTWISE["add"](e, node, a, b)
        assert isinstance(found, str)
        return found
    total = e.shared.unique(f"{e.stem}.sum")
    result = e.shared.unique(e.names[norm])
    inputs = (a, b, e.value(norm.args[1]))
    eps = norm.attr("eps")
    e.add(
        "SkipSimplifiedLayerNormalization", inputs, (result, "", "", total), MICROSOFT, epsilon=eps
    )
    e.values[norm] = (result,)
    return total


def _norm_of(e: Emitter, node: Node) -> Node | None:
    """The RMS norm of a residual sum, to be computed with it."""
    a, b = node.operands if len(node.operands) == 2 else (node, node)
    fits = node in e.members and node.dtype is DType.F32 and a.shape == b.shape == node.shape
    if not fits or node.type.rank not in (2, 3) or not isinstance(node.shape[-1], int):
        return None
    for user in e.graph.users.get(node, ()):
        weight = user.args[1] if user.op == "rms_norm" and user in e.members else None
        if weight is not None and is_constant(weight) and weight.dtype is DType.F32:
            return user
    return None


def rms_norm(
    e: Emitter,
    node: Node,
    x: str,
    weight: str = "",
    op: str = "SimplifiedLayerNormalization",
) -> str | Refusal:
    """RMS norm by ``op``: ONNX Runtime's own, or RMSNormalization of ONNX."""
    steps = bool(node.attr("stepwise"))
    scale = _ones(e, node) if steps or not weight else weight
    if isinstance(scale, Refusal):
        return scale
    scale = scale if steps else _as(e, scale, node.args[1], node.dtype)
    normed = e.op(op, x, scale, axis=-1, epsilon=node.attr("eps"))
    if not steps:
        return normed
    return _narrow(e, node, e.op("Mul", _wide(e, node, normed), _wide(e, node, weight)))


def _layer_norm(e: Emitter, node: Node, x: str, weight: str = "", bias: str = "") -> str | Refusal:
    scale = weight or _ones(e, node)
    if isinstance(scale, Refusal):
        return scale
    scale = _as(e, scale, node.args[1], node.dtype)
    bias = _as(e, bias, node.args[2], node.dtype)
    return e.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=node.attr("eps"))


def _ones(e: Emitter, node: Node) -> str | Refusal:
    width = node.shape[-1]
    if not isinstance(width, int):
        return Refusal("a norm over a symbolic size without a weight")
    return e.constant(np.ones(width, dtype=numpy_type(node.dtype)))


def _as(e: Emitter, name: str, node: Node | None, dtype: DType) -> str:
    """An operand in the element type that the op computes in."""
    if not name or node is None or node.dtype is dtype:
        return name
    return e.op("Cast", name, to=ELEMENT_TYPES[dtype])


def activate(e: Emitter, activation: str, x: str) -> str:
    """One of the IR's activations by name."""
    if activation == "silu":
        return e.op("Mul", x, e.op("Sigmoid", x))
    if activation in ("gelu", "gelu_tanh"):
        return e.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return e.op({"relu": "Relu", "sigmoid": "Sigmoid"}[activation], x)


def _gated(e: Emitter, node: Node, gate: str, up: str) -> str:
    activation = str(node.attr("activation"))
    if not node.attr("stepwise"):
        return e.op("Mul", activate(e, activation, gate), up)
    active = _step(e, node, activate(e, activation, _wide(e, node, gate)))
    return _narrow(e, node, e.op("Mul", active, _wide(e, node, up)))


def _wide(e: Emitter, node: Node, x: str) -> str:
    """A 16-bit value in float32: ONNX Runtime has few ops that round to 16 bits by themselves."""
    return e.op("Cast", x, to=ELEMENT_TYPES[DType.F32]) if _is_narrow(node) else x


def _narrow(e: Emitter, node: Node, x: str) -> str:
    """What was computed wide, in the node's element type."""
    return e.op("Cast", x, to=ELEMENT_TYPES[node.dtype]) if _is_narrow(node) else x


def _step(e: Emitter, node: Node, x: str) -> str:
    """A wide value where the model rounds, wide again."""
    return _wide(e, node, _narrow(e, node, x))


def _is_narrow(node: Node) -> bool:
    return node.dtype in (DType.F16, DType.BF16)


def _rope(e: Emitter, node: Node, x: str, cos: str, sin: str) -> str:
    x_node, cos_node, sin_node = node.operands
    heads = node.shape[1] if node.type.rank == 3 else None
    lead = (node.shape[0], 1)
    if node.dtype is DType.F32 and isinstance(heads, int) and cos_node.shape[:-1] == lead:
        return _rotary(e, node, x, cos, sin, heads)
    tables = (_as(e, cos, cos_node, node.dtype), _as(e, sin, sin_node, node.dtype))
    return _rotate(e, node, x, *tables)


def _rotary(e: Emitter, node: Node, x: str, cos: str, sin: str, heads: int) -> str:
    """By ONNX's own op, over one sequence of T tokens with a table row for each."""
    _, cos_node, sin_node = node.operands
    tokens, _, width = node.shape
    tables = []
    for table, table_node in ((cos, cos_node), (sin, sin_node)):
        table = _as(e, table, table_node, node.dtype)
        tables.append(e.view(table, (1, tokens, table_node.shape[-1])))
    half = cos_node.shape[-1]
    assert isinstance(half, int)
    attrs: dict[str, Any] = {
        "num_heads": heads,
        "interleaved": int(node.attr("layout") == "interleaved"),
        "rotary_embedding_dim": 0 if 2 * half == width else 2 * half,
    }
    rows = e.view(x, (1, tokens, heads * width))
    return e.view(e.op("RotaryEmbedding", rows, *tables, **attrs), node.shape)


def _rotate(e: Emitter, node: Node, x: str, cos: str, sin: str) -> str:
    half, width = node.operands[1].shape[-1], node.shape[-1]
    assert isinstance(half, int) and isinstance(width, int)
    rotated, rest = _cut(e, x, 0, 2 * half), _cut(e, x, 2 * half, width)
    if node.attr("layout") == "half":
        a, b = _cut(e, rotated, 0, half), _cut(e, rotated, half, 2 * half)
    else:
        a, b = _cut(e, rotated, 0, 2 * half, 2), _cut(e, rotated, 1, 2 * half, 2)
    steps = bool(node.attr("stepwise"))
    if steps:
        a, b, cos, sin = (_wide(e, node, value) for value in (a, b, cos, sin))
    a_cos, a_sin, b_cos, b_sin = (
        _step(e, node, product) if steps else product
        for product in (e.op("Mul", part, table) for part in (a, b) for table in (cos, sin))
    )
    first, second = e.op("Sub", a_cos, b_sin), e.op("Add", b_cos, a_sin)
    if steps:
        first, second = _narrow(e, node, first), _narrow(e, node, second)
    if node.attr("layout") == "interleaved":
        axis = e.ints(node.type.rank)
        pairs = [e.op("Unsqueeze", part, axis) for part in (first, second)]
        stacked = e.op("Concat", *pairs, axis=node.type.rank)
        turned = e.view(stacked, (*node.shape[:-1], 2 * half))
        parts = [turned]
    else:
        parts = [first, second]
    return e.op("Concat", *parts, *([rest] if 2 * half < width else []), axis=-1)


def _cut(e: Emitter, x: str, start: int, stop: int, step: int = 1) -> str:
    return e.op("Slice", x, e.ints(start), e.ints(stop), e.ints(-1), e.ints(step))


CONVERTERS: dict[str, Converter] = {
    "add": _add,
    "rms_norm": rms_norm,
    "layer_norm": _layer_norm,
    "gated": _gated,
    "rope": _rope,
}

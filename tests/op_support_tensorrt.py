"""The column of TensorRT on the page of ops, backends and precisions (`op_support.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from onnx_running import Held
from tilewright.codegen.constants import is_constant
from tilewright.codegen.tensorrt.regions import CONVERTERS, lower_region, refusals
from tilewright.errors import TilewrightError
from tilewright.ir.build import cast, const, input_node, item, make, param, reshape
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph, input_name
from tilewright.ir.node import Attr, Node
from tilewright.ir.types import TensorType

ROOM = 16
NO_TOKENS = "its sample has no axis of tokens"
T, B, L = map(symbol, "TBL")
# Moves and changes of type, which come and go around any op.
_AROUND = frozenset({"cast", "shuffle", "slice"})
# The layer that is the op itself, where others beside say of what: masks, scales, rows.
_ITSELF = {
    "layer_norm": "normalization",
    "linear": "matrix_multiply",
    "rope": "rotary_embedding",
    "scaled_linear": "matrix_multiply",
    "slot_attention": "attention",
}


@dataclass(frozen=True, slots=True)
class Found:
    """Whether an op has layers, is one of them, and else why not."""

    taken: bool
    whole: bool = False
    why: str = ""


def in_tensorrt(op: str, graph: Graph, given: Sequence[torch.Tensor]) -> Found:
    """What becomes of a graph of one op over tokens; ``given`` are its sample's values."""
    if op not in CONVERTERS:
        return Found(False, why="no layer computes it")
    try:
        own = _OWN.get(op)
        graph = over_tokens(graph, given) if own is None else own(graph.inputs[0].dtype)
    except TilewrightError:
        return Found(False, why=NO_TOKENS)
    if is_constant(graph.outputs[0]):
        return Found(False, why=NO_TOKENS)
    refused = refusals(graph, {}, ROOM)
    if refused:
        return Found(False, why=next(iter(refused.values())).reason)
    outputs = {f"result_{i}": node for i, node in enumerate(graph.outputs)}
    layers = lower_region(graph, graph.nodes, outputs, {}, ROOM).network.layers
    kinds = [layer.kind for layer in layers if layer.kind not in _AROUND]
    return Found(True, len(kinds) < 2 or _ITSELF.get(op) in kinds)


def over_tokens(graph: Graph, given: Sequence[torch.Tensor]) -> Graph:
    """The graph over inputs of tokens: those whose first axis is the result's. Caches are slots,
    and other operands weights.

    Raises:
        GraphError: an op whose sample does not go over tokens.
    """
    slots = any(node.op == "slot_attention" for node in graph.nodes)
    first = graph.outputs[0].shape[:1]
    new: dict[Node, Node] = {}
    held = dict(graph.weights)
    for index, (node, value) in enumerate(zip(graph.inputs, given, strict=True)):
        name, shape = input_name(node), node.shape
        if slots and index > 2:
            sizes = (B, shape[1], L, shape[3]) if len(shape) == 4 else (B,)
            name = {3: "k_cache_0", 4: "v_cache_0"}.get(index, name)
            new[node] = input_node(name, TensorType(node.dtype, sizes))
        elif shape and shape[:1] == first:
            new[node] = input_node(name, TensorType(node.dtype, (T, *shape[1:])))
        else:
            new[node] = param(name, node.type)
            held[name] = Held(value)
    for node in graph.nodes:
        if node in new:
            continue
        if node.op in ("param", "const"):
            new[node] = node
        elif node.op == "item":
            new[node] = item(new[node.operands[0]], int(str(node.attr("index"))))
        else:
            args = [None if arg is None else new[arg] for arg in node.args]
            new[node] = make(node.op, *args, **_attrs(node, first))
    inputs = tuple(new[node] for node in graph.inputs if new[node].op == "input")
    return Graph(graph.name, inputs, tuple(new[node] for node in graph.outputs), held)


def _moved(op: str, dtype: DType, **attrs: Attr) -> Graph:
    x = input_node("x", TensorType(dtype, (T, 4, 6)))
    return Graph("g", (x,), (make(op, x, **attrs),))


def _rope(dtype: DType) -> Graph:
    """With tables of positions, as in a model."""
    x = input_node("x", TensorType(dtype, (T, 4, 6)))
    positions = input_node("positions", TensorType(DType.I64, (T,)))
    angles = cast(reshape(positions, T, 1, 1), DType.F32)
    wide = make("mul", angles, make("expand", const(1.0, DType.F32), shape=(1, 1, 3)))
    cos, sin = (cast(make(name, wide), dtype) for name in ("cos", "sin"))
    return Graph("g", (x, positions), (make("rope", x, cos, sin),))


# Ops whose samples are not of tokens, or not of what a model has.
_OWN: dict[str, Callable[[DType], Graph]] = {
    "permute": lambda dtype: _moved("permute", dtype, dims=(0, 2, 1)),
    "reshape": lambda dtype: _moved("reshape", dtype, shape=(T, 24)),
    "rope": _rope,
}


def _attrs(node: Node, first: tuple[Size, ...]) -> dict[str, Attr]:
    """Its attributes, a shape over tokens where it has one."""
    attrs = dict(node.attrs)
    shape = attrs.get("shape")
    if isinstance(shape, tuple) and shape[:1] == first:
        attrs["shape"] = (T, *shape[1:])
    return attrs

"""Decode graphs of small models whose weights are codes, for tests of the one launch."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from tilewright.formats.weight_quant import QUANTIZING
from tilewright.ir.build import input_node, item, make, param, rebuild
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph, param_name
from tilewright.ir.node import Node
from tilewright.ir.ops.control import body_of
from tilewright.ir.ops.quant import blocks, packed_width
from tilewright.ir.types import TensorType

_LAYER = re.compile(r"(qkv|o|gate_up|down)_\d+")


@dataclass(frozen=True, slots=True)
class Coded:
    """How the weights of a model's layers are codes.

    Attributes:
        kind: f8e4m3, or u8 for two of 4 bits a byte.
        group, block: columns and rows that share a scale.
        rounds: whether x is rounded too.
        tries: of scales of x, a form that the one launch does not know.
    """

    kind: DType
    group: int = 0
    block: int = 1
    rounds: bool = False
    tries: int | None = None

    def graph(self, graph: Graph) -> Graph:
        """A decode graph with codes in the place of each weight of a layer."""
        values: dict[Node, Node] = {}
        for node in graph.nodes:
            known = node.op == "fused" and node.attr("kind") == "linear"
            weight = next((n for n in node.operands if known and _is_of_layer(n)), None)
            if weight is None:
                values[node] = rebuild(node, values)
            else:
                values[node] = self._product(node, weight, values)
        return graph.with_outputs(tuple(values[output] for output in graph.outputs))

    def tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by name, those of layers' weights as codes and scales."""
        found = dict(tensors)
        for name in filter(_LAYER.fullmatch, tensors):
            weight = found.pop(name)
            found[f"{name}.codes"], found[f"{name}.scale"] = self._codes(weight)
        return found

    def _codes(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = {name: function for name, (function, _) in QUANTIZING.items()}
        by = {"dtype": self.kind.torch, "rows": self.block, "group": self.group}
        scale, four = made["quantize_scale"](weight, **by), self.kind is DType.U8
        scale = scale.bfloat16() if four else scale
        codes = made["quantize_codes"](weight, scale, **by)
        return made["pack_codes"](codes, group=self.group) if four else codes, scale

    def _types(self, weight: Node) -> tuple[TensorType, TensorType]:
        n, k = (int(str(size)) for size in weight.shape)
        scales = (blocks(n, self.block), blocks(k, self.group))
        four = self.kind is DType.U8
        width = packed_width(k, self.group) if four else k
        of_scales = TensorType(DType.BF16 if four else DType.F32, scales)
        return TensorType(self.kind, (n, width)), of_scales

    def _product(self, node: Node, weight: Node, values: dict[Node, Node]) -> Node:
        body, types, name = body_of(node), self._types(weight), param_name(weight)
        parts = zip(("codes", "scale"), types, strict=True)
        own = [(input_node(f"w_{part}", t), param(f"{name}.{part}", t)) for part, t in parts]
        inner: dict[Node, Node] = {}
        inputs: list[tuple[Node, Node]] = []
        for old, outer in zip(body.inputs, node.operands, strict=True):
            inputs += own if outer is weight else [(old, values[outer])]
        for old in body.nodes:
            linear = old.op == "linear"
            x = inner.get(old.operands[0]) if linear else None
            inner[old] = rebuild(old, inner) if x is None else self._linear(x, own, weight)
        made = Graph(body.name, tuple(i for i, _ in inputs), tuple(inner[o] for o in body.outputs))
        return make("fused", *(outer for _, outer in inputs), body=made, kind="linear")

    def _linear(self, x: Node, own: list[tuple[Node, Node]], weight: Node) -> Node:
        (codes, _), (scale, _) = own
        by = {"group": self.group, "rows": self.block, "dtype": DType.BF16}
        if not self.rounds:
            width = int(str(weight.shape[1])) if self.kind is DType.U8 else None
            return make("linear", x, make("dequantize", codes, scale, width=width, **by))
        rows = make("quantize_rows", x, dtype=self.kind, group=self.group, tries=self.tries)
        return make("scaled_linear", item(rows, 0), item(rows, 1), codes, scale, **by)


def _is_of_layer(node: Node) -> bool:
    return node.op == "param" and _LAYER.fullmatch(param_name(node)) is not None

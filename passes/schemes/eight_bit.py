"""Weights of 8-bit codes, by rows, tensors or blocks: what the schemes with such weights share."""

from __future__ import annotations

from ...formats.weight_ops import AttrValue
from ...formats.weights import Weight, apply_weight
from ...ir.build import make
from ...ir.node import Node
from .base import Linear, Nodes, Parts, Scheme
from .config import QuantConfig


class EightBit(Scheme):
    """Symmetric codes in int8 or e4m3 with float32 scales."""

    def parts(self, weight: Weight, config: QuantConfig) -> Parts:
        """``codes`` [N, K] and ``scale`` by blocks."""
        block: dict[str, AttrValue] = {
            "dtype": self.codes.torch,
            "rows": self.block_rows,
            "group": config.group or 0,
        }
        scale = apply_weight("quantize_scale", (weight,), **block)
        return {
            "codes": apply_weight("quantize_codes", (weight, scale), **block),
            "scale": scale,
        }

    def value(self, parts: Nodes, linear: Linear, config: QuantConfig) -> Node:
        """``dequantize(codes, scale)``."""
        return make(
            "dequantize",
            parts["codes"],
            parts["scale"],
            dtype=linear.dtype,
            rows=self.block_rows,
            group=config.group or 0,
            compute=config.rounds_to,
        )

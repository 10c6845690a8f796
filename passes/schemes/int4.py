"""``int4``: 4-bit weights by groups of columns; activations stay as they are."""

from __future__ import annotations

import torch

from ...formats.weights import Weight, apply_weight
from ...ir.build import make
from ...ir.dtypes import DType
from ...ir.node import Node
from .base import Linear, Nodes, Parts, Scheme
from .config import QuantConfig

FINE = 256  # groups up to this size have 16-bit scales: 32 bits would be an eighth of the weight


class Int4(Scheme):
    """W4A16. Scales of groups are bfloat16, which has float32's range, those of rows float32; zero
    points are one byte each. Codes are rounded by the scale as it is stored.
    """

    name = "int4"
    codes = DType.U8
    groups = (128, 64, 32, 0)
    methods = ("rtn", "gptq", "awq")
    asymmetric = True
    computes = ("float", "int8")

    def parts(self, weight: Weight, config: QuantConfig) -> Parts:
        """``codes`` [N, K / 2], two a byte, ``scale`` and perhaps ``zero`` by groups."""
        group, four = config.group or 0, torch.uint8
        if config.symmetric:
            scale = apply_weight("quantize_scale", (weight,), dtype=four, rows=1, group=group)
        else:
            scale = apply_weight("quantize_range", (weight,), group=group)
        if 0 < group <= FINE:
            scale = apply_weight("cast", (scale,), dtype=torch.bfloat16)
        parts = {"scale": scale}
        if not config.symmetric:
            parts["zero"] = apply_weight("quantize_zero", (weight, scale), group=group)
        codes = apply_weight(
            "quantize_codes", (weight, *parts.values()), dtype=four, rows=1, group=group
        )
        return {"codes": apply_weight("pack_codes", (codes,), group=group), **parts}

    def value(self, parts: Nodes, linear: Linear, config: QuantConfig) -> Node:
        """``dequantize(codes, scale, zero?)``."""
        return make(
            "dequantize",
            parts["codes"],
            parts["scale"],
            parts.get("zero"),
            dtype=linear.dtype,
            group=config.group or 0,
            width=linear.width,
            compute=config.rounds_to,
        )


SCHEME = Int4()

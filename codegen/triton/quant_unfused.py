"""A fused product over codes as calls of its own, where no kernel takes it.

Its weight is decoded first, and the rest is what a fused product is without its kernel
(unfused.py)::

    fused_4 = rms_norm_dequantize_linear(x, w, codes, scale)

    fused_4.weight = dequantize(codes, scale)             # torch
    fused_4.normed = rms_norm(x, w)
    fused_4 = linear(fused_4.normed, fused_4.weight)
"""

from __future__ import annotations

from ...ir.build import make
from ...ir.node import Node
from ...ir.ops.control import body_of
from .kernels.quant_linear_tiles import dequantized_in, with_weight
from .unfused import Unfused


def separated(node: Node) -> Unfused | None:
    """The calls of a fused product, with that of its weight; None for other nodes, and where
    the product reads a view that the body makes.
    """
    if node.op != "fused" or node.attr("kind") != "linear":
        return None
    body, weight = body_of(node), dequantized_in(node)
    products = [inner for inner in body.nodes if inner.op == "linear"]
    read = [arg for product in products for arg in product.operands]
    if any(arg not in body.inputs for arg in read if arg is not weight and arg.op != "rms_norm"):
        return None
    if weight is None:
        return Unfused.of(node)
    outer = dict(zip(body.inputs, node.operands, strict=True))
    args = [None if arg is None else outer[arg] for arg in weight.args]
    decoded = make("dequantize", *args, **dict(weight.attrs))
    rest = Unfused.of(with_weight(node, weight, decoded))
    return None if rest is None else Unfused(node, (("weight", decoded), *rest.parts))

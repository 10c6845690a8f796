"""Contractions: a weight on the right makes a ``linear``, whose bias is added inside; an outer
product is ``mul``.
"""

from __future__ import annotations

from ..ir.build import make, permute, reshape
from ..ir.node import Node
from ..ir.ops.elementwise import broadcast
from .rewrite import Context, Rule

_LAYOUT = ("permute", "reshape", "cast", "slice")


def is_weight(node: Node) -> bool:
    """Whether a value is a param, in another layout or element type perhaps."""
    while node.op in _LAYOUT:
        node = node.operands[0]
    return node.op == "param"


def matmul_of_weight(node: Node, context: Context) -> Node | None:
    """``matmul(x, w [K, N]) → linear(x, permute(w, (1, 0)))``; also for w [1, …, K, N]."""
    x, weight = node.operands
    if not is_weight(weight) or any(size != 1 for size in weight.shape[:-2]):
        return None
    matrix = permute(reshape(weight, *weight.shape[-2:]), 1, 0)
    return reshape(make("linear", x, matrix), *node.shape)


def outer_product(node: Node, context: Context) -> Node | None:
    """``matmul(a [..., M, 1], b [..., 1, N]) → mul(a, b)``."""
    a, b = node.operands
    return make("mul", a, b) if a.shape[-1] == 1 else None


def matmul_of_flat_heads(node: Node, context: Context) -> Node | None:
    """``matmul`` of ``[B·H, S, D]`` reshaped from ``[B, H, S, D]``, both operands alike, works
    on the latter.
    """
    a, b = (
        operand.operands[0] if operand.op == "reshape" else operand for operand in node.operands
    )
    if a.type.rank != 4 or b.type.rank != 4 or a.shape[:2] != b.shape[:2]:
        return None
    flat = [operand.shape for operand in node.operands]
    if any(len(f) != 3 or f[1:] != n.shape[2:] for f, n in zip(flat, (a, b), strict=True)):
        return None
    return reshape(make("matmul", a, b), *node.shape)


def linear_of_reshape(node: Node, context: Context) -> Node | None:
    """``linear(reshape(x, (S, K)), w) → reshape(linear(x, w))`` where the last dimension stays."""
    x = node.operands[0]
    if x.op != "reshape" or not x.operands[0].shape or x.operands[0].shape[-1] != x.shape[-1]:
        return None
    return reshape(make("linear", x.operands[0], *node.args[1:]), *node.shape)


def bias_of_linear(node: Node, context: Context) -> Node | None:
    """``add(linear(x, w), b [N]) → linear(x, w, b)``, also below a reshape."""
    for linear, bias in (node.operands, node.operands[::-1]):
        inner = linear.operands[0] if linear.op == "reshape" else linear
        if inner.op != "linear" or len(inner.operands) != 2 or not is_weight(bias):
            continue
        fits = bias.shape == inner.shape[-1:] == linear.shape[-1:]
        if fits and linear.type == node.type and context.single_use(inner):
            return reshape(make("linear", *inner.operands, bias), *node.shape)
    return None


def matmul_of_expand(node: Node, context: Context) -> Node | None:
    """``matmul(expand(a), expand(b)) → expand(matmul(a, b))`` where only batch dimensions are
    expanded.
    """
    a, b = (n.operands[0] if n.op == "expand" else n for n in node.operands)
    if (a, b) == node.operands or a.type.rank < 2 or b.type.rank < 2:
        return None
    kept = all(n.shape[-2:] == o.shape[-2:] for n, o in zip((a, b), node.operands, strict=True))
    if not kept:
        return None
    batch = broadcast("matmul", a.type.with_shape(a.shape[:-2]), b.type.with_shape(b.shape[:-2]))
    product = make("matmul", a, b)
    return product if batch == node.shape[:-2] else make("expand", product, shape=node.shape)


MATMUL_RULES: tuple[Rule, ...] = (
    Rule("matmul_of_expand", ("matmul",), matmul_of_expand),
    Rule("outer_product", ("matmul",), outer_product),
    Rule("matmul_of_weight", ("matmul",), matmul_of_weight),
    Rule("matmul_of_flat_heads", ("matmul",), matmul_of_flat_heads),
    Rule("linear_of_reshape", ("linear",), linear_of_reshape),
    Rule("bias_of_linear", ("add",), bias_of_linear),
)

"""Matrix products: what multiplies by weights becomes ``linear``, the rest ``matmul``."""

from __future__ import annotations

from ...ir.build import cast, make, permute, reshape
from ...ir.node import Node
from .base import Call, Rule, as_node
from .shape import expand


def is_weight(x: Node) -> bool:
    """Whether a value depends on params and constants alone."""
    stack, seen = [x], set[Node]()
    while stack:
        node = stack.pop()
        if node.op == "input":
            return False
        for operand in node.operands:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return True


def transposed(x: Node) -> Node:
    """``xᵀ`` of a matrix; a transpose of a transpose is what it was."""
    if x.op == "permute" and x.attr("dims") == (1, 0):
        return x.operands[0]
    return permute(x, 1, 0)


def product_of(a: Node, b: Node, bias: Node | None = None) -> Node:
    """``a [..., K] @ b``, a ``linear`` if ``b [K, N]`` is a weight; vectors as in torch.matmul."""
    if b.type.rank == 2 and (bias is not None or is_weight(b)):
        return make("linear", a, transposed(b), bias)
    left = reshape(a, 1, *a.shape) if a.type.rank == 1 else a
    right = reshape(b, *b.shape, 1) if b.type.rank == 1 else b
    out = make("matmul", left, right)
    shape = list(out.shape)
    if b.type.rank == 1:
        del shape[-1]
    if a.type.rank == 1:
        del shape[-1 if b.type.rank == 1 else -2]
    return reshape(out, *shape)


def _matmul(left: str, right: str) -> Rule:
    return lambda c: product_of(c.tensor(left), c.tensor(right))


def _linear(c: Call) -> Node:
    return make("linear", c.tensor("input"), c.tensor("weight"), c.maybe("bias"))


def _addmm(c: Call) -> Node:
    """``beta · self + alpha · (a @ b)`` for mm and bmm."""
    names = ("mat1", "mat2") if "mat1" in c.args else ("batch1", "batch2")
    a, b = c.tensor(names[0]), c.tensor(names[1])
    added = c.tensor("self")
    beta, alpha = c.args.get("beta", 1), c.args.get("alpha", 1)
    plain = (beta, alpha) == (1, 1)
    if plain and b.type.rank == 2 and added.shape == b.shape[1:] and is_weight(b):
        return product_of(a, b, cast(added, a.dtype))
    out = product_of(a, b)
    if alpha != 1:
        out = make("mul", out, as_node(alpha, c.dtype))
    if beta == 0:
        return out
    if beta != 1:
        added = make("mul", added, as_node(beta, c.dtype))
    return make("add", expand(added, out.shape) if added.type.rank > 2 else added, out)


def _mv(c: Call) -> Node:
    return product_of(c.tensor("self"), c.tensor("vec"))


def _dot(c: Call) -> Node:
    return product_of(c.tensor("self"), c.tensor("tensor" if "tensor" in c.args else "other"))


def _outer(c: Call) -> Node:
    a, b = c.tensor("self", c.dtype), c.tensor("vec2", c.dtype)
    return make("mul", reshape(a, a.shape[0], 1), reshape(b, 1, b.shape[0]))


RULES: dict[str, Rule] = {
    "aten.linear": _linear,
    "aten.matmul": _matmul("self", "other"),
    "aten.mm": _matmul("self", "mat2"),
    "aten.bmm": _matmul("self", "mat2"),
    "aten.addmm": _addmm,
    "aten.baddbmm": _addmm,
    "aten.mv": _mv,
    "aten.dot": _dot,
    "aten.outer": _outer,
}

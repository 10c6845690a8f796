"""Boolean arithmetic, and arithmetic on masks: a mask is ``where(condition, constant, constant)``.

Models spell one mask in many ways (``(1 - mask) * min``, ``masked_fill`` of a ``masked_fill``,
tests of 0/1 tensors); the rules bring them to a condition over comparisons, which
passes/visibility.py then understands.
"""

from __future__ import annotations

from ..ir.build import const, make
from ..ir.dtypes import DType
from ..ir.node import Node
from .match import P, any_node, equation, fit, full, number, scalar, value_of
from .rewrite import Context, Rule

A, B, C, X, Y, Z = map(any_node, "abcxyz")
K, L = scalar("k"), scalar("l")
TRUE, FALSE = number(True), number(False)
_INVERSE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
_ON_MASKS = ("add", "sub", "mul", "div", "maximum", "minimum", *_INVERSE)


def constants_by_mask(node: Node) -> tuple[Node, Node, Node] | None:
    """(condition, value where true, value where false) of a two-valued tensor, None for any
    other.
    """
    if node.op == "where":
        condition, a, b = node.operands
        if value_of(a) is not None and value_of(b) is not None:
            return condition, a, b
    if node.op == "cast" and node.operands[0].dtype is DType.BOOL:
        return node.operands[0], const(1, node.dtype), const(0, node.dtype)
    return None


def constant_with_mask(node: Node, context: Context) -> Node | None:
    """``sub(1, where(c, 1, 0)) → where(c, 0, 1)``; ``mul(cast(c), k) → where(c, k, 0)``."""
    for i, operand in enumerate(node.operands):
        mask, other = constants_by_mask(operand), node.operands[1 - i]
        if mask is None or value_of(other) is None or not operand.type.rank >= other.type.rank:
            continue
        condition, a, b = mask
        on_true, on_false = (
            make(node.op, *((value, other) if i == 0 else (other, value))) for value in (a, b)
        )
        return fit(make("where", condition, on_true, on_false), node)
    return None


def cast_of_mask(node: Node, context: Context) -> Node | None:
    """``cast(where(c, 1, 0), bool) → where(c, true, false)``; the same for ``neg`` and
    ``isnan``.
    """
    operand = node.operands[0]
    if operand.op != "where" or (mask := constants_by_mask(operand)) is None:
        return None
    condition, a, b = mask
    attrs = dict(node.attrs)
    branches = (make(node.op, value, **attrs) for value in (a, b))
    return fit(make("where", condition, *branches), node)


def inverse_comparison(node: Node, context: Context) -> Node | None:
    """``logical_not(lt(a, b)) → ge(a, b)``; not for floats, where NaN makes both false."""
    test = node.operands[0]
    if test.op not in _INVERSE or test.operands[0].dtype.is_float and test.op not in ("eq", "ne"):
        return None
    return make(_INVERSE[test.op], *test.operands)


def same_difference(node: Node, context: Context) -> Node | None:
    """``eq(x, x) → true`` for integers."""
    a, b = node.operands
    if a is not b or a.dtype.is_float:
        return None
    return full(node.op in ("eq", "le", "ge"), node)


def nested_where(node: Node, context: Context) -> Node | None:
    """``where(c, x, where(c, y, z)) → where(c, x, z)``; ``where(c, where(d, x, k), k) → where(c
    & d, x, k)``.
    """
    condition, a, b = node.operands
    if b.op == "where" and b.operands[0] is condition:
        return fit(make("where", condition, a, b.operands[2]), node)
    if a.op != "where":
        return None
    inner, x, k = a.operands
    if inner is condition:
        return fit(make("where", condition, x, b), node)
    if k is b:
        return fit(make("where", make("logical_and", condition, inner), x, b), node)
    return None


def masked_by_product(node: Node, context: Context) -> Node | None:
    """``add(mul(x, where(c, 1, 0)), where(c, 0, k)) → where(c, x, k)``: the mask of the first
    GPT.
    """
    for product, bias in (node.operands, node.operands[::-1]):
        if product.op != "mul" or bias.op != "where":
            continue
        for x, factor in (product.operands, product.operands[::-1]):
            kept, added = constants_by_mask(factor), constants_by_mask(bias)
            if kept is None or added is None or kept[0] is not added[0]:
                continue
            if [value_of(v) for v in (*kept[1:], added[1])] == [1, 0, 0]:
                return fit(make("where", kept[0], x, added[2]), node)
    return None


def boolean_where(node: Node, context: Context) -> Node | None:
    """``where(c, x, false) → logical_and(c, x)`` and its kin, for boolean branches."""
    if node.dtype is not DType.BOOL:
        return None
    condition, a, b = node.operands
    values = (value_of(a), value_of(b))
    match values:
        case (True, False):
            result = condition
        case (False, True):
            result = make("logical_not", condition)
        case (True, None):
            result = make("logical_or", condition, b)
        case (None, False):
            result = make("logical_and", condition, a)
        case (False, None):
            result = make("logical_and", make("logical_not", condition), b)
        case _:
            return None
    return fit(result, node)


def test_of_boolean(node: Node, context: Context) -> Node | None:
    """``eq(b, true) → b``; ``eq(b, false) → logical_not(b)``; ``ne`` likewise."""
    x, k = node.operands
    if x.dtype is not DType.BOOL or (value := value_of(k)) is None:
        return None
    return fit(x if bool(value) == (node.op == "eq") else make("logical_not", x), node)


MASK_RULES: tuple[Rule, ...] = (
    Rule("constant_with_mask", _ON_MASKS, constant_with_mask),
    Rule("cast_of_mask", ("cast", "neg", "isnan"), cast_of_mask),
    Rule("inverse_comparison", ("logical_not",), inverse_comparison),
    Rule("same_difference", tuple(_INVERSE), same_difference),
    Rule("nested_where", ("where",), nested_where),
    Rule("masked_by_product", ("add",), masked_by_product),
    Rule("boolean_where", ("where",), boolean_where),
    Rule("test_of_boolean", ("eq", "ne"), test_of_boolean),
    equation("and_true", P.logical_and(X, TRUE), lambda x: x),
    equation("and_false", P.logical_and(X, FALSE), lambda x: full(False, x)),
    equation("or_false", P.logical_or(X, FALSE), lambda x: x),
    equation("or_true", P.logical_or(X, TRUE), lambda x: full(True, x)),
    equation("xor_false", P.logical_xor(X, FALSE), lambda x: x),
    equation("xor_true", P.logical_xor(X, TRUE), lambda x: make("logical_not", x)),
    equation("and_same", P.logical_and(X, X), lambda x: x),
    equation("or_same", P.logical_or(X, X), lambda x: x),
    equation("not_not", P.logical_not(P.logical_not(X)), lambda x: x),
    equation(
        "not_or",
        P.logical_not(P.logical_or(X, Y)),
        lambda x, y: make("logical_and", make("logical_not", x), make("logical_not", y)),
    ),
    equation("where_true", P.where(TRUE, X, Y), lambda x, y: x),
    equation("where_false", P.where(FALSE, X, Y), lambda x, y: y),
    equation("where_same", P.where(C, X, X), lambda c, x: x),
    equation("where_not", P.where(P.logical_not(C), X, Y), lambda c, x, y: make("where", c, y, x)),
)

"""What generated kernels know of rows that are rounded to codes (passes/open_rows.py), and need not
find out element by element.
"""

from __future__ import annotations

from ...ir.dtypes import DType
from ...ir.node import Node

_MOST = 448.0
"""The largest e4m3, the largest code there is."""


def is_magnitude(node: Node) -> bool:
    """Whether all values are 0 or more, or NaN: as integers their bits then have the same order,
    with NaN above all.
    """
    return node.op == "abs" and node.dtype is DType.F32


def is_clamped(node: Node) -> bool:
    """Whether all values are NaN, or such that e4m3 has codes for them: a cast makes no NaN."""
    if node.op != "maximum":
        return False
    inner, low = node.operands
    return _is_const(low, -_MOST) and inner.op == "minimum" and _is_const(inner.operands[1], _MOST)


def is_by_largest(node: Node) -> bool:
    """Whether a quotient is of a row by its own largest magnitude over that of the codes, or by 1
    where that is 0.
    """
    if node.op != "div" or node.dtype is not DType.F32:
        return False
    x, scale = node.operands
    if scale.op != "where":
        return False
    zero, one, share = scale.operands
    if zero.op != "eq" or zero.operands[0] is not share or not _is_const(one, 1.0):
        return False
    if not _is_const(zero.operands[1], 0.0) or share.op != "div":
        return False
    most, codes = share.operands
    known = codes.op == "const" and codes.attr("value") in (_MOST, 127.0)
    return (
        known
        and most.op == "amax"
        and most.operands[0].op == "abs"
        and most.operands[0].operands[0] is x
    )


def _is_const(node: Node, value: float) -> bool:
    return node.op == "const" and node.attr("value") == value

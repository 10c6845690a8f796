"""Arithmetic on weights alone becomes part of the weight: a new expression, computed once at
load.
"""

from __future__ import annotations

from ..formats.weight_ops import AttrValue
from ..formats.weights import FOLDABLE, Weight, apply_weight
from ..ir.dims import Size, is_nonnegative
from ..ir.dtypes import DType
from ..ir.graph import Graph, param_name
from ..ir.node import Attr, Node
from ..ir.schema import schema
from .base import Pass
from .match import value_of
from .rewrite import Context, Rule, rewrite

GROWTH = 2  # a result this many times as large as its weights is cheaper to compute than to store


def fold(node: Node, context: Context) -> Node | None:
    """``permute(param("w"))`` → ``param("w.permute")``, a weight ``permute(stored("w"), …)``."""
    params = [operand for operand in node.operands if operand.op == "param"]
    budget: Size = 0
    for weight in params:
        budget = budget + weight.type.numel * GROWTH
    if not params or not is_nonnegative(budget - node.type.numel):
        return None
    args = [_argument(operand, context) for operand in node.operands]
    attrs = _attributes(node)
    if attrs is None or any(arg is None for arg in args):
        return None
    folded = apply_weight(node.op, tuple(arg for arg in args if arg is not None), **attrs)
    if (folded.shape, folded.dtype) != (node.shape, node.dtype.torch):
        return None
    return context.add_weight(f"{param_name(params[0])}.{node.op}", folded)


def _argument(operand: Node, context: Context) -> Weight | int | float | None:
    if operand.op == "param":
        return context.weights.get(param_name(operand))  # type: ignore[return-value]
    value = value_of(operand)
    return None if isinstance(value, bool) else value


def _attributes(node: Node) -> dict[str, AttrValue] | None:
    """The node's attributes as the weight grammar has them, None when it has no word for one."""
    found: dict[str, AttrValue] = {}
    for name, value in node.attrs:
        if name == "step":
            if value != 1:
                return None
        elif not _known(value):
            return None
        else:
            found[name] = value.torch if isinstance(value, DType) else value  # type: ignore[assignment]
    return found


def _known(value: Attr) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(element, int) for element in value)
    return isinstance(value, int | DType)


_UNFOLDED = ("expand", "pad")  # the first only repeats, the second is spelled otherwise
_OPS = tuple(sorted(name for name in FOLDABLE if name not in _UNFOLDED and schema(name)))
FOLD_RULES: tuple[Rule, ...] = (Rule("fold", _OPS, fold),)


def fold_weights(graph: Graph) -> Graph:
    """Folds what depends on weights and constants only into new weights.

    Before::

        w: f32[64, 192] = param("attn.weight")
        permute_0: f32[192, 64] = permute(w, dims=(1, 0))
        linear_0: f32[S, 192] = linear(x, permute_0)

    After, with ``attn.weight.permute = permute(stored("attn.weight"), dims=(1, 0))``::

        attn_weight_permute: f32[192, 64] = param("attn.weight.permute")
        linear_0: f32[S, 192] = linear(x, attn_weight_permute)
    """
    return rewrite(graph, FOLD_RULES)


FOLD_WEIGHTS = Pass("fold_weights", fold_weights)

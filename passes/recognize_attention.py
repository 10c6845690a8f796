"""Attention written out: ``softmax(scale · q·kᵀ + bias, where masked) · v``.

The scores are peeled from the softmax inwards: masks and biases come off until the product of q
and k is left, in whatever order a model applies scale, soft-cap, bias and mask. Causal masks,
windows and ALiBi become attributes and operands of the op; masks and biases of any other kind stay
as its ``mask``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..ir.build import cast, const, make, permute, reshape
from ..ir.dims import Size
from ..ir.dtypes import DType
from ..ir.graph import Graph
from ..ir.node import Node
from .alibi import alibi_slopes
from .base import Pass
from .match import value_of
from .repeat_kv import grouped_heads
from .rewrite import Context, Rule, rewrite
from .visibility import Visibility, conjunction, visibility

# Scores are far smaller than this in every model; what is replaced by less gets no weight …
HIDDEN = -9999.0
# … unless a whole row is: then all its keys weigh alike, which an added mask keeps from here on.
DROWNED = -1e8
MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Masking:
    """What is done to the scores: ``hidden`` pairs of (condition to be visible, score
    otherwise), added ``biases``.
    """

    hidden: tuple[tuple[Node, float], ...] = ()
    biases: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """A product of q [..., S, D] and kᵀ [..., D, L], and what is done to it."""

    q: Node
    keys: Node
    scale: float = 1.0
    softcap: float | None = None
    masking: Masking = Masking()


def softmax_attention(node: Node, context: Context) -> Node | None:
    """``matmul(softmax(scores), v) → attention(q, k, v)``."""
    weights, v = node.operands
    weights = _below(weights)
    if weights.op != "softmax" or weights.attr("dim") != weights.type.rank - 1:
        return None
    if not context.single_use(weights):
        return None
    found = next(_peel(weights.operands[0], 1.0, MAX_DEPTH), None)
    if found is None:
        return None
    q, q_scale = _unscaled(found.q, MAX_DEPTH)
    swapped = (*range(found.keys.type.rank - 2), found.keys.type.rank - 1, found.keys.type.rank - 2)
    k, k_scale = _unscaled(permute(found.keys, *swapped), MAX_DEPTH)
    q4, k4, v4 = (_four(_narrowed(x, v.dtype)) for x in (q, k, v))
    if not _fits(q4, k4, v4, node):
        return None
    scale = found.scale * q_scale * k_scale
    result = make("attention", q4, k4, v4, scale=scale, softcap=found.softcap)
    return reshape(masked(result, found.masking), *node.shape)


def read_mask(node: Node, context: Context) -> Node | None:
    """``attention(q, k, v, mask)`` → the same with what the mask says as attributes, where it
    says any.
    """
    mask = node.args[3]
    if mask is None:
        return None
    plain = make("attention", *node.operands[:3], None, *node.args[4:], **dict(node.attrs))
    found = Masking(((mask, float("-inf")),)) if value_is_bool(mask) else _split(mask, MAX_DEPTH)
    result = masked(plain, found)
    return result if result.args[3] is not mask else None


def masked(attention: Node, masking: Masking) -> Node:
    """An ``attention`` node without mask, given one."""
    q, k, v, _, sinks, slopes = attention.args
    assert q is not None and k is not None
    scores: tuple[Size, ...] = (*q.shape[:3], k.shape[2])
    seen = Visibility()
    rest: list[tuple[Node, float]] = []
    for condition, otherwise in masking.hidden:
        one = visibility([condition], scores)
        seen = seen.both(replace(one, rest=()))
        rest += [(part, otherwise) for part in one.rest]
    biases: list[Node] = []
    for bias in masking.biases:
        found = alibi_slopes(bias, q.shape[1]) if slopes is None and sinks is None else None
        if found is not None:
            slopes = found
        else:
            biases.append(bias)
    causal = seen.causal or bool(attention.attr("causal"))
    windows = [w for w in (seen.window, attention.attr("window")) if isinstance(w, int)]
    attrs = {
        **dict(attention.attrs),
        "causal": causal,
        "window": min(windows, default=None),
    }
    mask = _mask(rest, biases, q)
    return make("attention", q, k, v, mask, sinks, slopes, **attrs)


def _mask(rest: list[tuple[Node, float]], biases: list[Node], q: Node) -> Node | None:
    """One mask operand of what no attribute can say: boolean where only -inf hides, else
    additive.
    """
    if not biases and rest and all(otherwise == float("-inf") for _, otherwise in rest):
        return conjunction([condition for condition, _ in rest])
    total: Node | None = None
    for bias in biases:
        bias = cast(bias, q.dtype)
        total = bias if total is None else make("add", total, bias)
    for condition, otherwise in rest:
        zero = const(0.0, q.dtype) if total is None else total
        total = make("where", condition, zero, const(otherwise, q.dtype))
    return total


def _peel(node: Node, outer: float, depth: int) -> Iterator[Scores]:
    """Each way to read ``node`` as scores, ``outer`` being the factor that stands outside of it."""
    if depth == 0:
        return
    inner = _below(node)
    if inner is not node:
        yield from _peel(inner, outer, depth - 1)
        return
    match node.op:
        case "matmul":
            q, keys = node.operands
            yield Scores(q, keys, scale=outer)
        case "mul" if (factor := value_of(node.operands[1])) is not None:
            yield from _peel(node.operands[0], outer * float(factor), depth - 1)
            if outer == 1.0:
                yield from _capped(node.operands[0], float(factor), depth - 1)
        case "add":
            for scores, bias in (node.operands, node.operands[::-1]):
                if scores.type.numel == node.type.numel:
                    for found in _peel(scores, outer, depth - 1):
                        yield _with(found, _split(_scaled(bias, outer), depth))
        case "where":
            yield from _peel_where(node, outer, depth)
        case "maximum" if _hides(node.operands[1], outer) is not None:
            yield from _peel(node.operands[0], outer, depth - 1)


def _peel_where(node: Node, outer: float, depth: int) -> Iterator[Scores]:
    condition, a, b = node.operands
    for visible, scores, otherwise in ((condition, a, b), (_not(condition), b, a)):
        hidden = _hides(otherwise, outer)
        known = hidden is not None and not visibility([visible], node.shape).rest
        if hidden is not None and (known or hidden <= DROWNED):
            for found in _peel(scores, outer, depth - 1):
                yield _with(found, Masking(((visible, hidden),)))


def _capped(node: Node, cap: float, depth: int) -> Iterator[Scores]:
    """``tanh(scores / cap)``, inside ``mul(…, cap)``: only a scale may lie within."""
    node = _below(node)
    if node.op != "tanh" or cap <= 0:
        return
    for found in _peel(node.operands[0], cap, depth - 1):
        if found.masking == Masking() and found.softcap is None:
            yield replace(found, softcap=cap)


def _split(bias: Node, depth: int) -> Masking:
    """A bias taken apart: sums, and ``where(condition, bias, -inf)``; zeros vanish."""
    value = value_of(bias)
    if value == 0:
        return Masking()
    inner = _below(bias)
    if inner is not bias and depth and (inner.dtype.is_float or value_is_bool(inner)):
        found = _split(inner, depth - 1)
        return Masking(found.hidden, tuple(cast(b, bias.dtype) for b in found.biases))
    if bias.op == "add" and depth:
        first, second = (_split(operand, depth - 1) for operand in bias.operands)
        return Masking(first.hidden + second.hidden, first.biases + second.biases)
    if bias.op == "where" and depth:
        condition, a, b = bias.operands
        for visible, kept, otherwise in ((condition, a, b), (_not(condition), b, a)):
            hidden = _hides(otherwise, 1.0)
            if hidden is not None and _hides(kept, 1.0) is None:
                found = _split(kept, depth - 1)
                return Masking(((visible, hidden), *found.hidden), found.biases)
    return Masking((), (bias,))


def _with(scores: Scores, masking: Masking) -> Scores:
    both = Masking(masking.hidden + scores.masking.hidden, masking.biases + scores.masking.biases)
    return replace(scores, masking=both)


def _hides(node: Node, outer: float) -> float | None:
    """The score that ``node`` puts on all keys, when it is low enough to hide them."""
    value = value_of(node)
    if value is None or outer <= 0 or value * outer > HIDDEN:
        return None
    return max(float(value) * outer, float(value))


def _unscaled(node: Node, depth: int) -> tuple[Node, float]:
    """``node`` without a constant factor below its reshapes and permutes, and the factor."""
    if depth and node.op in ("reshape", "permute"):
        inner, scale = _unscaled(node.operands[0], depth - 1)
        return (make(node.op, inner, **dict(node.attrs)), scale) if scale != 1.0 else (node, 1.0)
    factor = value_of(node.operands[1]) if node.op == "mul" else None
    if factor and node.operands[0].type == node.type:
        return node.operands[0], float(factor)
    return node, 1.0


def _scaled(bias: Node, factor: float) -> Node:
    return bias if factor == 1.0 else make("mul", bias, const(factor, bias.dtype))


def _below(node: Node) -> Node:
    """Below casts between floats, expands and reshapes that add leading ones or drop them."""
    x = node.operands[0] if node.operands else node
    match node.op:
        case "cast" if x.dtype.is_float and node.dtype.is_float:
            return _below(x)
        case "expand":
            return _below(x)
        case "reshape" if _stripped(x) == _stripped(node):
            return _below(x)
    return node


def _stripped(node: Node) -> tuple[Size, ...]:
    shape = list(node.shape)
    while shape and shape[0] == 1:
        shape.pop(0)
    return tuple(shape)


def _four(x: Node) -> Node | None:
    """x [..., S, D] of rank 2, 3 or 4 as [B, H, S, D]."""
    rank = x.type.rank
    return reshape(x, *(1,) * (4 - rank), *x.shape) if 2 <= rank <= 4 else None


def _narrowed(x: Node, dtype: DType) -> Node:
    """x before it was cast up from v's ``dtype``; the op computes in float32 by itself."""
    if x.dtype is dtype or x.op not in ("cast", "permute", "reshape"):
        return x
    source = x.operands[0]
    if x.op == "cast":
        return source if source.dtype is dtype else x
    inner = _narrowed(source, dtype)
    return x if inner is source else make(x.op, inner, **dict(x.attrs))


def _fits(q: Node | None, k: Node | None, v: Node | None, product: Node) -> bool:
    """Whether matmul's broadcast is attention's: one batch size, one KV head or as many as of q."""
    if q is None or k is None or v is None or not q.dtype is k.dtype is v.dtype:
        return False
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1] not in (q.shape[1], 1):
        return False
    lengths = k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    ones = [size for size in (*q.shape[:3], v.shape[3]) if size != 1]
    return lengths and ones == [size for size in product.shape if size != 1]


def _not(condition: Node) -> Node:
    inverse = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt"}
    if condition.op in inverse and condition.operands[0].dtype.is_integer:
        return make(inverse[condition.op], *condition.operands)
    return make("logical_not", condition)


def value_is_bool(node: Node) -> bool:
    """Whether a mask is boolean."""
    return not node.dtype.is_float and not node.dtype.is_integer


ATTENTION_RULES: tuple[Rule, ...] = (
    Rule("softmax_attention", ("matmul",), softmax_attention),
    Rule("read_mask", ("attention",), read_mask),
    Rule("grouped_heads", ("attention",), grouped_heads),
)


def recognize_attention(graph: Graph) -> Graph:
    """Finds attention.

    Before::

        permute_0: f32[1, 4, 16, S] = permute(k, dims=(0, 1, 3, 2))
        matmul_0: f32[1, 4, S, S] = matmul(q, permute_0)
        mul_0: f32[1, 4, S, S] = mul(matmul_0, f32(0.25))
        iota_0: i64[S] = iota(dtype=i64, size=S)
        reshape_0: i64[S, 1] = reshape(iota_0, shape=(S, 1))
        le_0: bool[S, S] = le(iota_0, reshape_0)
        where_0: f32[1, 4, S, S] = where(le_0, mul_0, f32(-inf))
        softmax_0: f32[1, 4, S, S] = softmax(where_0, dim=3)
        matmul_1: f32[1, 4, S, 16] = matmul(softmax_0, v)

    After::

        attention_0: f32[1, 4, S, 16] = attention(q, k, v, causal=True, scale=0.25)
    """
    return rewrite(graph, ATTENTION_RULES)


RECOGNIZE_ATTENTION = Pass("recognize_attention", recognize_attention)

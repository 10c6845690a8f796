"""RMSNorm (Zhang & Sennrich, 1910.07467) and LayerNorm (Ba et al., 1607.06450), found by their
arithmetic.

The core is found first; then the casts around it, the weight and the bias join it, in whatever
order they stand. A weight that joins in 16 bits makes it ``stepwise``: the model rounds before it.
"""

from __future__ import annotations

from ..ir.build import make
from ..ir.graph import Graph
from ..ir.node import Attr, Node
from .base import Pass
from .match import Capture, P, any_node, equation, scalar, steps_round, value_of
from .rewrite import Context, Rule, rewrite

X, EPS = any_node("x"), scalar("eps")
NORMS = ("rms_norm", "layer_norm")


def _over_last(mean: Node, x: Node) -> bool:
    return bool(mean.attr("keepdim")) and mean.attr("dims") == (x.type.rank - 1,)


def _rms(x: Node, mean: Node, eps: Node) -> Node | None:
    value = value_of(eps)
    if value is None or not x.dtype.is_float or not _over_last(mean, x):
        return None
    return make("rms_norm", x, eps=float(value))


def centred(node: Node, context: Context) -> Node | None:
    """``rms_norm(sub(x, mean(x)), w) → layer_norm(x, w)``."""
    d, weight = node.args
    assert d is not None
    if d.op != "sub":
        return None
    x, mean = d.operands
    if mean.op != "mean" or mean.operands[0] is not x or not _over_last(mean, x):
        return None
    return make("layer_norm", x, weight, eps=node.attr("eps")) if x.type == d.type else None


def weighted(node: Node, context: Context) -> Node | None:
    """``mul(rms_norm(x), w [D]) → rms_norm(x, w)``; the same for ``layer_norm``.

    The Llama family multiplies what it has rounded to 16 bits, Gemma before it rounds.
    """
    for norm, weight in (node.operands, node.operands[::-1]):
        plain = norm.op in NORMS and len(norm.operands) == 1
        if plain and weight.shape == norm.shape[-1:] and context.single_use(norm):
            attrs: dict[str, Attr] = {"eps": norm.attr("eps")}
            if norm.op == "rms_norm":
                attrs["stepwise"] = steps_round(node)
            return make(norm.op, norm.operands[0], weight, **attrs)
    return None


def biased(node: Node, context: Context) -> Node | None:
    """``add(layer_norm(x, w), b [D]) → layer_norm(x, w, b)``."""
    for norm, bias in (node.operands, node.operands[::-1]):
        if norm.op != "layer_norm" or norm.args[2] is not None:
            continue
        if bias.shape == norm.shape[-1:] and context.single_use(norm):
            return make("layer_norm", *norm.args[:2], bias, eps=norm.attr("eps"))
    return None


def narrow(node: Node, context: Context) -> Node | None:
    """``cast(rms_norm(cast(x: bf16, f32), w), bf16) → rms_norm(x, w)``: the op computes in
    float32 by itself.
    """
    norm = node.operands[0]
    if norm.op not in NORMS or norm.operands[0].op != "cast" or not context.single_use(norm):
        return None
    if norm.attr("stepwise"):  # it rounds to a type that the whole does not have
        return None
    x = norm.operands[0].operands[0]
    if x.dtype is not node.dtype or not x.dtype.is_float or x.dtype.bytes > norm.dtype.bytes:
        return None
    affine = norm.args[1:]
    if norm.op == "layer_norm":
        affine = tuple(_as(a, x) for a in affine)
        if any(
            new is None and old is not None for new, old in zip(affine, norm.args[1:], strict=True)
        ):
            return None
    return make(norm.op, x, *affine, eps=norm.attr("eps"))


def _as(weight: Node | None, x: Node) -> Node | None:
    """A weight in x's element type when that is where it was cast from."""
    if weight is None or weight.dtype is x.dtype:
        return weight
    source = weight.operands[0] if weight.op == "cast" else None
    return source if source is not None and source.dtype is x.dtype else None


NORM_RULES: tuple[Rule, ...] = (
    equation(
        "mean_of_squares",
        P.mul(X, P.rsqrt(P.add(Capture("mean", P.mean(P.mul(X, X))), EPS))),
        lambda x, mean, eps: _rms(x, mean, eps),
    ),
    Rule("centred", ("rms_norm",), centred),
    Rule("weighted", ("mul",), weighted),
    Rule("biased", ("add",), biased),
    Rule("narrow", ("cast",), narrow),
)


def recognize_norm(graph: Graph) -> Graph:
    """Finds normalisations.

    Before::

        mul_0: f32[S, 64] = mul(x, x)
        mean_0: f32[S, 1] = mean(mul_0, dims=(1,), keepdim=True)
        add_0: f32[S, 1] = add(mean_0, f32(1e-06))
        rsqrt_0: f32[S, 1] = rsqrt(add_0)
        mul_1: f32[S, 64] = mul(x, rsqrt_0)
        mul_2: f32[S, 64] = mul(weight, mul_1)

    After::

        rms_norm_0: f32[S, 64] = rms_norm(x, weight, eps=1e-06)
    """
    return rewrite(graph, NORM_RULES)


RECOGNIZE_NORM = Pass("recognize_norm", recognize_norm)

"""Activations: the IR's own, and those composed of its primitives."""

from __future__ import annotations

from ...ir.build import make
from ...ir.node import Node
from .base import Call, Rule, scalar
from .elementwise import expm1


def _own(op: str) -> Rule:
    return lambda c: make(op, c.tensor("self", c.dtype))


def _gelu(c: Call) -> Node:
    approximate = c.text("approximate")
    attrs = {} if approximate == "none" else {"approximate": approximate}
    return make("gelu", c.tensor("self"), **attrs)


def _hardtanh(c: Call) -> Node:
    x = c.tensor("self")
    low = c.operand("min_val", x.dtype) if "min_val" in c.args else scalar(0, x)
    high = c.operand("max_val", x.dtype) if "max_val" in c.args else scalar(6, x)
    return make("minimum", make("maximum", x, low), high)


def _positive(x: Node) -> Node:
    return make("gt", x, scalar(0, x))


def _leaky_relu(c: Call) -> Node:
    x = c.tensor("self")
    return make("where", _positive(x), x, make("mul", x, c.operand("negative_slope", x.dtype)))


def _prelu(c: Call) -> Node:
    x = c.tensor("self")
    weight = c.tensor("weight")
    return make("where", _positive(x), x, make("mul", weight, x))


def _elu(c: Call) -> Node:
    x = c.tensor("self")
    alpha, scale = c.number("alpha"), c.number("scale")
    grown = make("mul", x, c.operand("input_scale", x.dtype))
    below = make("mul", expm1(make("minimum", grown, scalar(0, x))), scalar(alpha * scale, x))
    return make("where", _positive(x), make("mul", x, scalar(scale, x)), below)


def softplus(x: Node, beta: float = 1.0, threshold: float = 20.0) -> Node:
    """``log(1 + exp(beta · x)) / beta``, linear above the threshold as in torch."""
    grown = x if beta == 1 else make("mul", x, scalar(beta, x))
    # exp(grown) itself overflows below the threshold in float16.
    tail = make("log1p", make("exp", make("neg", make("abs", grown))))
    bent = make("add", make("relu", grown), tail)
    if beta != 1:
        bent = make("div", bent, scalar(beta, x))
    return make("where", make("gt", grown, scalar(threshold, x)), x, bent)


def _softplus(c: Call) -> Node:
    return softplus(c.tensor("self"), c.number("beta"), c.number("threshold"))


def _mish(c: Call) -> Node:
    x = c.tensor("self")
    return make("mul", x, make("tanh", softplus(x)))


def _log_sigmoid(c: Call) -> Node | tuple[Node | None, ...]:
    x = c.tensor("self")
    tail = make("log1p", make("exp", make("neg", make("abs", x))))
    y = make("sub", make("minimum", x, scalar(0, x)), tail)
    return (y, None) if len(c.results) > 1 else y


def _sixth(x: Node) -> Node:
    shifted = make("maximum", make("add", x, scalar(3, x)), scalar(0, x))
    return make("div", make("minimum", shifted, scalar(6, x)), scalar(6, x))


def _hardsigmoid(c: Call) -> Node:
    return _sixth(c.tensor("self"))


def _hardswish(c: Call) -> Node:
    x = c.tensor("self")
    return make("mul", x, _sixth(x))


def _glu(c: Call) -> Node:
    x = c.tensor("self")
    dim = c.axis("dim", x.type.rank)
    half = c.type.shape[dim]
    a = make("slice", x, dim=dim, start=0, stop=half)
    b = make("slice", x, dim=dim, start=half, stop=x.shape[dim])
    return make("mul", a, make("sigmoid", b))


def _threshold(c: Call) -> Node:
    x = c.tensor("self")
    low = make("le", x, c.operand("threshold", x.dtype))
    return make("where", low, c.operand("value", x.dtype), x)


RULES: dict[str, Rule] = {
    "aten.relu": _own("relu"),
    "aten.silu": _own("silu"),
    "aten.gelu": _gelu,
    "aten.hardtanh": _hardtanh,
    "aten.relu6": _hardtanh,
    "aten.leaky_relu": _leaky_relu,
    "aten._prelu_kernel": _prelu,
    "aten.elu": _elu,
    "aten.softplus": _softplus,
    "aten.mish": _mish,
    "aten.log_sigmoid": _log_sigmoid,
    "aten.log_sigmoid_forward": _log_sigmoid,
    "aten.hardsigmoid": _hardsigmoid,
    "aten.hardswish": _hardswish,
    "aten.glu": _glu,
    "aten.threshold": _threshold,
}

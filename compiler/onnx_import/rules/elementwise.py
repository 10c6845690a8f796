"""Arithmetic, comparisons, logic and activations. ONNX operands have one element type."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call, Rule
from ..values import Value, joint_shape, same_shape, tensor_of
from .dtypes import dtype_of
from .known import uniform


def _unary(function: Callable[[Tensor], Tensor]) -> Rule:
    return lambda c: function(c.tensor(0))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    return lambda c: function(c.tensor(0), c.tensor(1))


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    return lambda c: reduce(function, (c.tensor(index) for index in range(len(c.values))))


def _mean(c: Call) -> Tensor:
    total = _many(torch.add)(c)
    assert isinstance(total, Tensor)
    return total / len(c.values)


def _div(c: Call) -> Tensor:
    a, b = c.tensor(0), c.tensor(1)
    return a / b if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


def _mod(c: Call) -> Tensor:
    function = torch.fmod if c.integer("fmod", 0) else torch.remainder
    return function(c.tensor(0), c.tensor(1))


def _pow(c: Call) -> Tensor:
    base = c.tensor(0)
    return torch.pow(base, c.tensor(1)).to(base.dtype)


def _clip(c: Call) -> Tensor:
    x = c.tensor(0)
    low, high = c.maybe(1), c.maybe(2)
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _where(c: Call) -> Value:
    condition, *branches = (c.needed(index) for index in range(3))
    truth = uniform(condition)
    shape = joint_shape(*(value.shape for value in (condition, *branches)))
    if truth is not None and shape is not None:
        chosen = branches[0 if truth else 1]
        return chosen if same_shape(chosen.shape, shape) else tensor_of(chosen).expand(shape)
    a, b = map(tensor_of, branches)
    return torch.where(tensor_of(condition), a, b)


def _and(c: Call) -> Value:
    for one, other in ((0, 1), (1, 0)):
        a, b = c.needed(one), c.needed(other)
        shape = joint_shape(a.shape, b.shape)
        if uniform(a) and shape is not None:
            return b if same_shape(b.shape, shape) else tensor_of(b).expand(shape)
    return torch.logical_and(c.tensor(0), c.tensor(1))


def _cast(c: Call) -> Tensor:
    c.allow("saturate", 1)
    return c.tensor(0).to(dtype_of(c, c.integer("to", 0)))


def _gelu(c: Call) -> Tensor:
    c.allow("approximate", "none", "tanh")
    return F.gelu(c.tensor(0), approximate=c.text("approximate", "none"))


def _swish(c: Call) -> Tensor:
    x, alpha = c.tensor(0), c.number("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(x * alpha)


def _elu(c: Call) -> Tensor:
    return F.elu(c.tensor(0), c.number("alpha", 1.0))


def _selu(c: Call) -> Tensor:
    alpha = c.number("alpha", 1.67326319217681884765625)
    gamma = c.number("gamma", 1.05070102214813232421875)
    return gamma * F.elu(c.tensor(0), alpha)


def _celu(c: Call) -> Tensor:
    x, alpha = c.tensor(0), c.number("alpha", 1.0)
    return alpha * F.elu(x / alpha)


def _leaky_relu(c: Call) -> Tensor:
    return F.leaky_relu(c.tensor(0), c.number("alpha", 0.01))


def _prelu(c: Call) -> Tensor:
    x = c.tensor(0)
    return torch.where(x < 0, x * c.tensor(1), x)


def _hard_sigmoid(c: Call) -> Tensor:
    return (c.tensor(0) * c.number("alpha", 0.2) + c.number("beta", 0.5)).clamp(0, 1)


def _thresholded_relu(c: Call) -> Tensor:
    x = c.tensor(0)
    return torch.where(x > c.number("alpha", 1.0), x, torch.zeros_like(x))


def _is_inf(c: Call) -> Tensor:
    x = c.tensor(0)
    positive, negative = c.integer("detect_positive", 1), c.integer("detect_negative", 1)
    if positive and negative:
        return torch.isinf(x)
    wanted = float("inf") if positive else -float("inf")
    return x == wanted if positive or negative else torch.zeros_like(x, dtype=torch.bool)


def _dropout(c: Call) -> tuple[Value | None, ...]:
    if uniform(c.value(2)) or (c.value(2) is not None and uniform(c.value(2)) is None):
        c.refuse("dropout for inference", "training_mode")
    x = c.needed(0)
    mask = torch.ones(tuple(x.shape), dtype=torch.bool) if c.wants(1) else None
    return x, mask


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Equal": torch.eq,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}
RULES: dict[str, Rule] = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    **{name: _binary(function) for name, function in _BINARY.items()},
    "And": _and,
    "Cast": _cast,
    "CastLike": lambda c: c.tensor(0).to(c.tensor(1).dtype),
    "Celu": _celu,
    "Clip": _clip,
    "Div": _div,
    "Dropout": _dropout,
    "Elu": _elu,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "IsInf": _is_inf,
    "LeakyRelu": _leaky_relu,
    "Max": _many(torch.maximum),
    "Mean": _mean,
    "Min": _many(torch.minimum),
    "Mod": _mod,
    "PRelu": _prelu,
    "Pow": _pow,
    "Selu": _selu,
    "Sum": _many(torch.add),
    "Swish": _swish,
    "ThresholdedRelu": _thresholded_relu,
    "Where": _where,
}

"""Normalisations, rotary embedding, gated activations: what the recognisers find in transformers.

Their references compute in float32 at least and round once, as the kernels do. With ``stepwise``
they round where models do that write the formula in 16 bits: after each step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..dims import Size
from ..node import Node
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType
from .elementwise import broadcast


def widened(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def check_stepwise(op: str, stepwise: bool | None, x: TensorType, *others: TensorType) -> None:
    """GraphError for a ``stepwise`` that is neither True nor None, or where the steps are not all
    in one element type that torch computes in.
    """
    if stepwise is None:
        return
    if stepwise is not True or x.dtype.is_float8 or any(o.dtype is not x.dtype for o in others):
        raise ill_typed(op, "stepwise True or None, and then one element type", x, *others)


def _norm_type(x: TensorType, *affine: TensorType | None, eps: float) -> TensorType:
    given = [a for a in affine if a is not None]
    if not x.rank or not x.dtype.is_float or any(not a.dtype.is_float for a in given):
        raise ill_typed("norm", "floats of rank 1 or more", x, *given)
    if any(a.shape != x.shape[-1:] for a in given):
        raise ill_typed("norm", "weight and bias of the last dimension", x, *given)
    return x


def _rms_norm_type(
    x: TensorType, weight: TensorType | None = None, *, eps: float, stepwise: bool | None = None
) -> TensorType:
    if weight is None:  # a single step: one spelling
        if stepwise is not None:
            raise ill_typed("rms_norm", "a weight where it is stepwise", x)
        return _norm_type(x, eps=eps)
    check_stepwise("rms_norm", stepwise, x, weight)
    return _norm_type(x, weight, eps=eps)


def _rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float,
    stepwise: bool | None = None,
) -> torch.Tensor:
    wide = widened(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if stepwise:
        y = y.to(x.dtype)
    return (y if weight is None else widened(y) * weight.to(wide.dtype)).to(x.dtype)


def _layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
) -> torch.Tensor:
    wide = widened(x)
    weight, bias = (None if a is None else a.to(wide.dtype) for a in (weight, bias))
    return torch.nn.functional.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(x.dtype)


def _rope_type(
    x: TensorType,
    cos: TensorType,
    sin: TensorType,
    *,
    layout: str = "half",
    stepwise: bool | None = None,
) -> TensorType:
    check_stepwise("rope", stepwise, x, cos, sin)
    half, width = cos.shape[-1], x.shape[-1]
    if cos.shape != sin.shape or layout not in ("half", "interleaved"):
        raise ill_typed("rope", "cos and sin of one shape, layout half or interleaved", x, cos, sin)
    if not isinstance(half, int) or not isinstance(width, int) or 2 * half > width:
        raise ill_typed("rope", "cos and sin [..., R/2] with R <= D", x, cos, sin)
    lead = x.with_shape(x.shape[:-1])
    if broadcast("rope", lead, cos.with_shape(cos.shape[:-1])) != lead.shape:
        raise ill_typed("rope", "cos and sin that broadcast to x", x, cos, sin)
    if not x.dtype.is_float or not cos.dtype.is_float or not sin.dtype.is_float:
        raise ill_typed("rope", "floats", x, cos, sin)
    return x


def _rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "half",
    stepwise: bool | None = None,
) -> torch.Tensor:
    half = cos.shape[-1]
    wide = x if stepwise else widened(x)  # torch rounds each product and sum to its element type
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    rotated, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    if layout == "half":
        a, b = rotated[..., :half], rotated[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned, rest), -1).to(x.dtype)


def _gated_type(
    gate: TensorType, up: TensorType, *, activation: str, stepwise: bool | None = None
) -> TensorType:
    check_stepwise("gated", stepwise, gate, up)
    if gate != up or activation not in ACTIVATIONS or not gate.dtype.is_float:
        raise ill_typed("gated", f"equal types, activation among {sorted(ACTIVATIONS)}", gate, up)
    return gate


def _gated(
    gate: torch.Tensor, up: torch.Tensor, *, activation: str, stepwise: bool | None = None
) -> torch.Tensor:
    active = ACTIVATIONS[activation](widened(gate))
    if stepwise:
        active = active.to(gate.dtype)
    return (active * widened(up)).to(gate.dtype)


def _flops_norm(node: Node) -> Size:
    return node.type.numel * 6


def _flops_rope(node: Node) -> Size:
    return node.type.numel * 3


def _x(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


RMS_NORM = register(
    OpSchema(
        "rms_norm",
        ("x", "weight?"),
        _rms_norm_type,
        _rms_norm,
        ("eps", "stepwise"),
        _flops_norm,
        lambda g: [
            Sample((_x(g, 3, 8), _x(g, 8)), {"eps": 1e-5}),
            Sample((_x(g, 3, 8),), {"eps": 1e-6}),
            Sample((_x(g, 3, 8), _x(g, 8)), {"eps": 1e-5, "stepwise": True}),
        ],
    )
)
LAYER_NORM = register(
    OpSchema(
        "layer_norm",
        ("x", "weight?", "bias?"),
        _norm_type,
        _layer_norm,
        ("eps",),
        _flops_norm,
        lambda g: [
            Sample((_x(g, 3, 8), _x(g, 8), _x(g, 8)), {"eps": 1e-5}),
            Sample((_x(g, 3, 8), _x(g, 8)), {"eps": 1e-5}),
            Sample((_x(g, 3, 8), None, _x(g, 8)), {"eps": 1e-5}),
        ],
    )
)
ROPE = register(
    OpSchema(
        "rope",
        ("x", "cos", "sin"),
        _rope_type,
        _rope,
        ("layout", "stepwise"),
        _flops_rope,
        lambda g: [
            Sample((_x(g, 3, 2, 8), _x(g, 3, 1, 4), _x(g, 3, 1, 4)), {"layout": "half"}),
            Sample((_x(g, 3, 2, 8), _x(g, 3, 1, 2), _x(g, 3, 1, 2)), {"layout": "interleaved"}),
            Sample((_x(g, 3, 2, 8), _x(g, 3, 1, 4), _x(g, 3, 1, 4)), {"stepwise": True}),
        ],
    )
)
GATED = register(
    OpSchema(
        "gated",
        ("gate", "up"),
        _gated_type,
        _gated,
        ("activation", "stepwise"),
        lambda node: node.type.numel * 10,
        lambda g: [
            Sample((_x(g, 3, 8), _x(g, 3, 8)), {"activation": name, "stepwise": stepwise})
            for name in ACTIVATIONS
            for stepwise in (None, True)
        ],
    )
)

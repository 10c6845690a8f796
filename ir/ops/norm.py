"""Normalisations, rotary embedding and gated activations: what the recognisers find in a transformer."""

from __future__ import annotations

import torch

from ..node import Node
from ..dims import Size
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def _norm_type(x: TensorType, *affine: TensorType | None, eps: float) -> TensorType:
    if any(a is not None and a.shape != x.shape[-1:] for a in affine):
        raise ill_typed("norm", "weight and bias of the last dimension", x, *affine)
    return x


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)


def _layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _rope_type(
    x: TensorType, cos: TensorType, sin: TensorType, *, layout: str = "half"
) -> TensorType:
    half, width = cos.shape[-1], x.shape[-1]
    if cos.shape != sin.shape or layout not in ("half", "interleaved"):
        raise ill_typed("rope", "cos and sin of one shape, layout half or interleaved", x, cos, sin)
    if not isinstance(half, int) or not isinstance(width, int) or 2 * half > width:
        raise ill_typed("rope", "cos and sin [..., R/2] with R <= D", x, cos, sin)
    return x


def _rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, layout: str = "half"
) -> torch.Tensor:
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if layout == "half":
        a, b = rotated[..., :half], rotated[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned, rest), -1)


def _gated_type(gate: TensorType, up: TensorType, *, activation: str) -> TensorType:
    if gate != up or activation not in ACTIVATIONS:
        raise ill_typed("gated", f"equal types, activation among {sorted(ACTIVATIONS)}", gate, up)
    return gate


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
        _norm_type,
        _rms_norm,
        ("eps",),
        _flops_norm,
        lambda g: [
            Sample((_x(g, 3, 8), _x(g, 8)), {"eps": 1e-5}),
            Sample((_x(g, 3, 8),), {"eps": 1e-6}),
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
        ],
    )
)
ROPE = register(
    OpSchema(
        "rope",
        ("x", "cos", "sin"),
        _rope_type,
        _rope,
        ("layout",),
        _flops_rope,
        lambda g: [
            Sample((_x(g, 3, 2, 8), _x(g, 3, 1, 4), _x(g, 3, 1, 4)), {"layout": "half"}),
            Sample((_x(g, 3, 2, 8), _x(g, 3, 1, 2), _x(g, 3, 1, 2)), {"layout": "interleaved"}),
        ],
    )
)
GATED = register(
    OpSchema(
        "gated",
        ("gate", "up"),
        _gated_type,
        lambda gate, up, *, activation: ACTIVATIONS[activation](gate) * up,
        ("activation",),
        lambda node: node.type.numel * 10,
        lambda g: [
            Sample((_x(g, 3, 8), _x(g, 3, 8)), {"activation": name}) for name in ACTIVATIONS
        ],
    )
)

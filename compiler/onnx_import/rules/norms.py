"""Normalisations, those of ONNX Runtime too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call, Result, Rule
from ..values import Value


def _tail(x: Tensor, axis: int) -> list[int]:
    return list(x.shape[axis % x.dim() :])


def _layer_norm(c: Call) -> Result:
    x, scale, bias = c.tensor(0), c.tensor(1), c.maybe(2)
    axis, eps = c.integer("axis", -1), c.number("epsilon", 1e-5)
    normed = F.layer_norm(x, _tail(x, axis), scale, bias, eps)
    if not c.wants(1) and not c.wants(2):
        return normed
    axes = list(range(axis % x.dim(), x.dim()))
    wide = x.float()
    mean = wide.mean(axes, keepdim=True)
    variance = ((wide - mean) ** 2).mean(axes, keepdim=True)
    return normed, mean, torch.rsqrt(variance + eps)


def _rms(x: Tensor, scale: Tensor, axis: int, eps: float) -> Tensor:
    return F.rms_norm(x, _tail(x, axis), scale, eps)


def _rms_norm(c: Call) -> Tensor:
    x, scale = c.tensor(0), c.tensor(1)
    axis, eps = c.integer("axis", -1), c.number("epsilon", 1e-5)
    if list(scale.shape) == _tail(x, axis):
        return _rms(x, scale, axis, eps)
    axes = list(range(axis % x.dim(), x.dim()))
    return x * torch.rsqrt((x * x).mean(axes, keepdim=True) + eps) * scale


def _skip_rms_norm(c: Call) -> tuple[Value | None, ...]:
    total = c.tensor(0) + c.tensor(1)
    bias = c.maybe(3)
    total = total if bias is None else total + bias
    return _rms(total, c.tensor(2), -1, c.number("epsilon", 1e-5)), None, None, total


def _skip_layer_norm(c: Call) -> tuple[Value | None, ...]:
    total, bias = c.tensor(0) + c.tensor(1), c.maybe(4)
    total = total if bias is None else total + bias
    eps = c.number("epsilon", 1e-12)
    normed = F.layer_norm(total, _tail(total, -1), c.tensor(2), c.maybe(3), eps)
    return normed, None, None, total


def _batch_norm(c: Call) -> Tensor:
    c.allow("training_mode", 0)
    scale, bias, mean, variance = (c.tensor(index) for index in range(1, 5))
    eps = c.number("epsilon", 1e-5)
    return F.batch_norm(c.tensor(0), mean, variance, scale, bias, eps=eps)


def _group_norm(c: Call) -> Tensor:
    groups, eps = c.integer("num_groups", 1), c.number("epsilon", 1e-5)
    if c.step.version < 21:
        c.refuse("GroupNormalization of opset 21 or later", f"opset {c.step.version}")
    return F.group_norm(c.tensor(0), groups, c.tensor(1), c.tensor(2), eps)


RULES: dict[str, Rule] = {
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    # ONNX Runtime keeps this one in the domain of the standard, which does not know it.
    "SimplifiedLayerNormalization": _rms_norm,
}
MICROSOFT: dict[str, Rule] = {
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
}

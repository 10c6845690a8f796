"""Activations, normalisations, convolutions, embeddings and mixtures of experts."""

from __future__ import annotations

import torch

from ...ir.build import cast, make, permute, reshape
from ...ir.dims import Size, product
from ...ir.node import Node
from .activations import RULES as ACTIVATIONS
from .base import Call, Rule


def _embedding(c: Call) -> Node:
    return make("embedding", c.tensor("weight"), c.tensor("indices"))


def _flat_norm(op: str, c: Call, x: Node, affine: tuple[Node | None, ...], eps: float) -> Node:
    """A norm over the last dimensions, seen as one."""
    shape = c.sizes_of("normalized_shape")
    lead = x.shape[: x.type.rank - len(shape)]
    flat = reshape(x, *lead, product(shape))
    rows = [None if a is None else reshape(cast(a, x.dtype), product(shape)) for a in affine]
    return reshape(make(op, flat, *rows, eps=float(eps)), *x.shape)


def _layer_norm(c: Call) -> Node | tuple[Node | None, ...]:
    x = c.tensor("input")
    out = _flat_norm("layer_norm", c, x, (c.maybe("weight"), c.maybe("bias")), c.number("eps"))
    return (out, None, None) if c.op == "aten.native_layer_norm" else out


def _rms_norm(c: Call) -> Node:
    x = c.tensor("input")
    eps = c.number("eps") if c.given("eps") else torch.finfo(x.dtype.torch).eps
    return _flat_norm("rms_norm", c, x, (c.maybe("weight"),), eps)


def _group_norm(c: Call) -> Node:
    x = c.tensor("input")
    groups = c.integer("num_groups")
    grouped = reshape(x, x.shape[0], groups, product(x.shape[1:]) // groups)
    y = reshape(make("layer_norm", grouped, eps=float(c.number("eps"))), *x.shape)
    return _by_channel(y, c.maybe("weight", x.dtype), c.maybe("bias", x.dtype))


def _by_channel(x: Node, factor: Node | None, shift: Node | None) -> Node:
    """``x [B, C, …] · factor [C] + shift [C]``."""
    if factor is not None:
        x = make("mul", x, _channels(factor, x))
    return x if shift is None else make("add", x, _channels(shift, x))


def _channels(vector: Node, x: Node) -> Node:
    return reshape(vector, x.shape[1], *((1,) * (x.type.rank - 2)))


def _batch_norm(c: Call) -> tuple[Node | None, ...] | None:
    if c.flag("training") or c.flag("train"):
        return None
    x = c.tensor("input")
    mean, var = c.tensor("running_mean", x.dtype), c.tensor("running_var", x.dtype)
    inverse = make("rsqrt", make("add", var, _eps(c, var)))
    centred = make("sub", x, _channels(mean, x))
    y = make("mul", centred, _channels(inverse, x))
    y = _by_channel(y, c.maybe("weight", x.dtype), c.maybe("bias", x.dtype))
    return (y, *(None for _ in c.results[1:])) if len(c.results) > 1 else (y,)


def _eps(c: Call, like: Node) -> Node:
    return c.operand("eps", like.dtype)


def _conv(c: Call) -> Node | None:
    if c.flag("transposed"):
        return None
    x, weight = c.tensor("input"), c.tensor("weight")
    spatial = weight.type.rank - 2
    if isinstance(c.args["padding"], str):
        return None
    batched = x if x.type.rank == weight.type.rank else reshape(x, 1, *x.shape)
    out = make(
        "conv",
        batched,
        weight,
        c.maybe("bias"),
        stride=c.integers("stride", spatial),
        padding=c.integers("padding", spatial),
        dilation=c.integers("dilation", spatial),
        groups=c.integer("groups"),
    )
    return out if batched is x else reshape(out, *c.type.shape)


def _experts(c: Call) -> Node | None:
    activation, gated = c.text("activation"), c.flag("gated")
    clamped = activation == "swiglu_clamped"
    if not gated or activation == "relu_squared":
        return None
    up, down = c.tensor("up"), c.tensor("down")
    if c.flag("transposed"):
        up, down = permute(up, 0, 2, 1), permute(down, 0, 2, 1)
    # gpt-oss: gate and up alternate, are clamped at 7, and alpha is 1.702
    extra = {"interleaved": True, "limit": 7.0, "alpha": 1.702} if clamped else {}
    return make(
        "moe_experts",
        c.tensor("x"),
        c.tensor("expert_ids"),
        c.tensor("expert_weights"),
        up,
        down,
        c.maybe("up_bias"),
        c.maybe("down_bias"),
        activation="silu" if clamped else activation,
        **extra,
    )


def _channel_shuffle(c: Call) -> Node:
    x = c.tensor("self")
    groups = c.integer("groups")
    channels = x.shape[1]
    rest: tuple[Size, ...] = x.shape[2:]
    apart = reshape(x, x.shape[0], groups, channels // groups, *rest)
    swapped = permute(apart, 0, 2, 1, *range(3, apart.type.rank))
    return reshape(swapped, *x.shape)


RULES: dict[str, Rule] = {
    **ACTIVATIONS,
    "aten.embedding": _embedding,
    "aten.layer_norm": _layer_norm,
    "aten.native_layer_norm": _layer_norm,
    "aten.rms_norm": _rms_norm,
    "aten.group_norm": _group_norm,
    "aten._native_batch_norm_legit_no_training": _batch_norm,
    "aten._native_batch_norm_legit": _batch_norm,
    "aten.batch_norm": _batch_norm,
    "aten.convolution": _conv,
    "aten.conv1d": _conv,
    "aten.conv2d": _conv,
    "aten.conv3d": _conv,
    "aten.channel_shuffle": _channel_shuffle,
    "tilewright.moe_experts": _experts,
}

"""One layer of attention in each form that heads come in: x [1, S, 24] to the same, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewriting import with_weights
from tilewright.ir.build import input_node, make, param, permute, reshape
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType
from tilewright.ir.verifier import verify

HEADS, WIDTH, HIDDEN, LENGTH = 4, 6, 24, 7
S = symbol("S")


@dataclass(frozen=True)
class Kind:
    """What layers differ in.

    Attributes:
        kv_heads: G.
        rotated: columns that a rotary embedding turns; 0 for no such embedding.
        layout: of its pairs.
        fused: whether one linear makes queries, keys and values.
        bias: whether linears have one.
        norm: whether heads of queries and keys are normalised.
        slopes: whether scores have ALiBi's.
    """

    kv_heads: int = 4
    rotated: int = 0
    layout: str = "half"
    fused: bool = False
    bias: bool = False
    norm: bool = False
    slopes: bool = False


KINDS = {
    "mha": Kind(rotated=6),
    "gqa": Kind(rotated=6, kv_heads=2),
    "partial": Kind(rotated=4, bias=True),
    "interleaved": Kind(rotated=4, layout="interleaved", fused=True),
    "unrotated": Kind(fused=True, bias=True),
    "normed": Kind(rotated=6, norm=True),
    "slopes": Kind(slopes=True, bias=True),
}


def weight(name: str, *shape: int) -> Node:
    """A param in float64."""
    return param(name, TensorType(DType.F64, shape))


def attention_layer(kind: Kind, seed: int = 0) -> Graph:
    """The layer, with random weights."""
    x = input_node("x", TensorType(DType.F64, (1, S, HIDDEN)))
    counts = {"q": HEADS, "k": kind.kv_heads, "v": kind.kv_heads}
    total = sum(counts.values()) * WIDTH
    whole = _linear("qkv", x, total, kind) if kind.fused else None
    heads, start = [], 0
    for role, count in counts.items():
        stop = start + count * WIDTH
        if whole is None:
            flat = _linear(role, x, count * WIDTH, kind)
        else:
            flat = make("slice", whole, dim=2, start=start, stop=stop)
        heads.append(_cut(role, flat, count, kind))
        start = stop
    slopes = weight("slopes", HEADS) if kind.slopes else None
    out = make("attention", *heads, None, None, slopes, causal=True, scale=0.4)
    joined = reshape(permute(out, 0, 2, 1, 3), 1, S, HEADS * WIDTH)
    graph = Graph("layer", (x,), (_linear("o", joined, HIDDEN, kind),))
    return verify(with_weights(graph, torch.Generator().manual_seed(seed)))


def _linear(name: str, x: Node, rows: int, kind: Kind) -> Node:
    bias = weight(f"{name}.bias", rows) if kind.bias else None
    return make("linear", x, weight(f"{name}.weight", rows, HIDDEN), bias)


def _cut(role: str, flat: Node, count: int, kind: Kind) -> Node:
    value = reshape(flat, 1, S, count, WIDTH)
    if kind.norm and role != "v":
        value = make("rms_norm", value, weight(f"{role}.norm", WIDTH), eps=1e-6)
    value = permute(value, 0, 2, 1, 3)
    if kind.rotated and role != "v":
        value = make("rope", value, *_angles(kind), layout=kind.layout)
    return value


def _angles(kind: Kind) -> tuple[Node, Node]:
    """cos and sin [S, R / 2] of positions times frequencies."""
    steps = make("cast", make("iota", dtype=DType.I64, size=S), dtype=DType.F64)
    rate = weight("frequencies", kind.rotated // 2)
    angle = make("mul", reshape(steps, S, 1), rate)
    return make("cos", angle), make("sin", angle)

"""Attention over a dense batch: MHA, GQA, MQA, windows, soft-capping, sinks, ALiBi and masks.

Scores are ``scale * q @ k.T``, soft-capped as ``c * tanh(s / c)`` (Gemma 2), plus
``alibi[h] * (j - i)`` (Press et al., 2108.12409) and the additive ``mask``. Key j is visible to
query i when ``j <= i`` (causal), ``i - j < window`` and the boolean ``mask`` is true; the S queries
are the last S of the L positions (torch's ``is_causal`` aligns them with the first).
A sink is one more logit a head that takes probability and carries no value (gpt-oss).
"""

from __future__ import annotations

import torch

from ..dims import Size, call, divide
from ..dtypes import DType
from ..node import Node
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType
from .elementwise import broadcast
from .norm import widened

ATTENTION_ATTRS = ("scale", "causal", "window", "softcap")


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    far: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Softmax attention of q [..., H, S, D] over k [..., G, L, D] and v [..., G, L, E].

    It computes in float32 at least. ``visible`` (bool) and ``bias`` broadcast to [..., H, S, L];
    ``sinks`` is [H]. A row that sees nothing gives 0. ``far`` is other queries like q, and which
    keys meet them instead, bool [L].
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[-3] // k.shape[-3]
    keys, values = (x.to(wide).repeat_interleave(group, -3) for x in (k, v))
    scores = torch.matmul(q.to(wide), keys.transpose(-1, -2)) * scale
    if far is not None:
        others = torch.matmul(far[0].to(wide), keys.transpose(-1, -2)) * scale
        scores = torch.where(far[1], others, scores)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.to(wide)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(wide)[:, None, None]
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    return torch.matmul(weights / total.clamp_min(torch.finfo(wide).tiny), values).to(q.dtype)


def visibility(
    query_positions: torch.Tensor, key_positions: torch.Tensor, causal: bool, window: int | None
) -> torch.Tensor | None:
    """Which keys each query sees, bool [S, L]; None when it sees all."""
    distance = query_positions[:, None] - key_positions[None, :]
    visible = distance >= 0 if causal else None
    if window is not None:
        near = distance < window
        visible = near if visible is None else visible & near
    return visible


def alibi_bias(
    slopes: torch.Tensor | None, query_positions: torch.Tensor, key_positions: torch.Tensor
) -> torch.Tensor | None:
    """``slopes[h] · (j - i)``, [H, S, L]; None without slopes."""
    if slopes is None:
        return None
    distance = key_positions[None, :] - query_positions[:, None]
    wide = widened(slopes)  # bfloat16 cannot tell 256 from 257
    return wide[:, None, None] * distance.to(wide.dtype)


def mask_and_bias(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    alibi: torch.Tensor | None,
    causal: bool,
    window: int | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What dense attention of q [B, H, S, D] over k [B, G, L, D] sees, and what is added to its
    scores: both broadcast to [B, H, S, L], None where it is all and nothing.
    """
    queries, keys = q.shape[2], k.shape[2]
    # The queries are the last S of L positions, so that a cached prefix keeps its meaning.
    query_positions = torch.arange(keys - queries, keys, device=q.device)
    key_positions = torch.arange(keys, device=q.device)
    visible = visibility(query_positions, key_positions, causal, window)
    bias = alibi_bias(alibi, query_positions, key_positions)
    if mask is not None and mask.dtype == torch.bool:
        visible = mask if visible is None else visible & mask
    elif mask is not None:
        bias = mask if bias is None else bias + mask
    return visible, bias


def heads_fit(op: str, q: TensorType, k: TensorType, v: TensorType, head_axis: int) -> None:
    """Query heads are a multiple of KV heads, and q and k have one head dim; else GraphError."""
    heads, kv_heads = q.shape[head_axis], k.shape[head_axis]
    fits = q.shape[-1] == k.shape[-1] and divide(heads, kv_heads) is not None
    if not fits or len({q.dtype, k.dtype, v.dtype}) > 1 or not q.dtype.is_float:
        raise ill_typed(op, "H a multiple of G, equal head dims and float element types", q, k, v)


def head_vectors_fit(op: str, heads: Size, *vectors: TensorType | None) -> None:
    """Sinks and ALiBi slopes are floats [H]; else GraphError."""
    for vector in vectors:
        if vector is not None and (vector.shape != (heads,) or not vector.dtype.is_float):
            raise ill_typed(op, f"sinks and alibi of floats [{heads}]", vector)


def window_fits(op: str, window: int | None) -> None:
    """A window holds at least the query's own position; else GraphError."""
    if window is not None and window < 1:
        raise ill_typed(op, f"a window of at least 1, not {window}")


def _attention_type(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    mask: TensorType | None = None,
    sinks: TensorType | None = None,
    alibi: TensorType | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> TensorType:
    ranks = q.rank == k.rank == v.rank == 4
    if not ranks or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ill_typed("attention", "q [B, H, S, D], k [B, G, L, D], v [B, G, L, E]", q, k, v)
    heads_fit("attention", q, k, v, 1)
    head_vectors_fit("attention", q.shape[1], sinks, alibi)
    window_fits("attention", window)
    if mask is not None and mask.dtype not in (DType.BOOL, q.dtype):
        raise ill_typed("attention", "a boolean mask or one of q's element type", q, mask)
    scores = q.with_shape((*q.shape[:3], k.shape[2]))
    if mask is not None and broadcast("attention", scores, mask) != scores.shape:
        raise ill_typed("attention", "a mask that broadcasts to [B, H, S, L]", q, k, mask)
    return q.with_shape((*q.shape[:3], v.shape[3]))


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    visible, bias = mask_and_bias(q, k, mask, alibi, causal, window)
    return attend(q, k, v, visible, bias, sinks, scale, softcap)


def attention_flops(node: Node) -> Size:
    """Two matmuls over all pairs of q [B, H, S, D] and k [B, G, L, D], half of them if causal."""
    q, k = node.operands[:2]
    v = node.operands[2]
    pairs = q.type.shape[0] * q.type.shape[1] * q.type.shape[2] * k.type.shape[2]
    flops = pairs * (q.shape[3] + v.shape[3]) * 2
    return call("floordiv", flops, 2) if node.attr("causal") else flops


def _x(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _samples(g: torch.Generator) -> list[Sample]:
    q, k, v = _x(g, 2, 4, 5, 8), _x(g, 2, 2, 5, 8), _x(g, 2, 2, 5, 8)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    return [
        Sample((q, k, v), {"scale": 0.3, "causal": True}),
        Sample((q, k, v), {"scale": 0.3, "causal": True, "window": 2, "softcap": 5.0}),
        Sample((q, k, v, None, _x(g, 4)), {"scale": 0.3, "causal": True}),
        Sample((q, k, v, None, None, slopes), {"scale": 0.3, "causal": True}),
        Sample((q, k, v, _x(g, 1, 1, 5, 5)), {"scale": 0.3}),
    ]


ATTENTION = register(
    OpSchema(
        "attention",
        ("q", "k", "v", "mask?", "sinks?", "alibi?"),
        _attention_type,
        _attention,
        ATTENTION_ATTRS,
        attention_flops,
        _samples,
    )
)

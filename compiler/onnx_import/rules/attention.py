"""Attention and rotary embedding: of ONNX, and of ONNX Runtime over a fresh cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...hf_attention import attention as hooked
from ..call import Call, Result, Rule
from ..values import Known, Size, Value, same, tensor_of

_QUERY_LENGTHS = 16  # of GroupQueryAttention: which rows of a padded batch are there


def _heads(x: Tensor, count: int) -> Tensor:
    """[B, S, H * D] as [B, H, S, D]."""
    batch, length, width = x.shape
    return x.reshape(batch, length, count, width // count).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[B, H, S, D] as [B, S, H * D]."""
    batch, heads, length, width = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * width)


def _joined(past: Value | None, new: Tensor) -> tuple[Tensor, Size]:
    """Keys or values with those before them, and how many those are."""
    if past is None or same(past.shape[2], 0):
        return new, 0
    return torch.cat([tensor_of(past), new], dim=2), past.shape[2]


def _attention(c: Call) -> Result:
    c.allow("qk_matmul_output_mode", 0)
    if c.value(6) is not None or c.wants(3):
        c.refuse("no nonpad_kv_seqlen and no scores as a result", "one of them")
    q, k, v = (c.tensor(index) for index in range(3))
    packed = q.dim() == 3
    if packed:
        q = _heads(q, c.integer("q_num_heads", 1))
        k, v = (_heads(part, c.integer("kv_num_heads", 1)) for part in (k, v))
    (k, before), (v, _) = _joined(c.value(4), k), _joined(c.value(5), v)
    scale = c.number("scale", 1 / math.sqrt(q.shape[3]))
    causal, softcap = bool(c.integer("is_causal", 0)), c.number("softcap", 0.0)
    mask = _padded(c.maybe(3), k.shape[2])
    if causal and (mask is not None or softcap or not same(q.shape[2], k.shape[2])):
        rows, columns = (torch.arange(size) for size in (q.shape[2], k.shape[2]))
        seen = torch.le(columns, rows.unsqueeze(1) + before)
        mask = _both(mask, seen, q.dtype)
        causal = False
    if softcap:
        # A soft cap comes before the mask since opset 24's text; a mask that hides allows no other.
        bias = _additive(mask, q.dtype)
        out = hooked(q, k, v, None, bias, scale, False, None, None, softcap).transpose(1, 2)
    else:
        grouped = not same(q.shape[1], k.shape[1])
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return (_flat(out) if packed else out), k, v


def _padded(mask: Tensor | None, keys: int) -> Tensor | None:
    """A mask over all keys: those beyond its end are hidden."""
    if mask is None or same(mask.shape[-1], keys) or same(mask.shape[-1], 1):
        return mask
    hidden = False if mask.dtype is torch.bool else -math.inf
    return F.pad(mask, (0, keys - mask.shape[-1]), value=hidden)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.full((), -math.inf, dtype=dtype))


def _both(mask: Tensor | None, seen: Tensor, dtype: torch.dtype) -> Tensor:
    if mask is None:
        return seen
    if mask.dtype is torch.bool:
        return mask & seen
    return torch.where(seen, mask, torch.full((), -math.inf, dtype=dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turns the first 2 R columns of x [..., D] by angles [..., R]."""
    turned = 2 * cos.shape[-1]
    rest = x[..., turned:] if turned < x.shape[-1] else None
    if interleaved:
        a, b = x[..., 0:turned:2], x[..., 1:turned:2]
    else:
        a, b = x[..., : turned // 2], x[..., turned // 2 : turned]
    first, second = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        pairs = torch.stack((first, second), dim=-1).flatten(-2)
        return pairs if rest is None else torch.cat((pairs, rest), dim=-1)
    return torch.cat((first, second) if rest is None else (first, second, rest), dim=-1)


def _angles(table: Tensor, positions: Tensor | None) -> Tensor:
    """[B, S, R] of a table [L, R] over positions [B, S], or the table itself."""
    return table if positions is None else F.embedding(positions.long(), table)


def _rotary(c: Call) -> Tensor:
    """RotaryEmbedding of ONNX: x [B, H, S, D] or [B, S, H * D]."""
    return _rotary_of(c, c.maybe(3), 1, 2)


def _rotary_microsoft(c: Call) -> Tensor:
    positions = c.tensor(1)
    if positions.dim() == 1:
        c.refuse("positions [B, S]", "an offset")
    return _rotary_of(c, positions, 2, 3)


def _rotary_of(c: Call, positions: Tensor | None, cos_at: int, sin_at: int) -> Tensor:
    x = c.tensor(0)
    cos, sin = (_angles(c.tensor(index), positions) for index in (cos_at, sin_at))
    heads, packed = c.integer("num_heads", 0), x.dim() == 3
    if packed and not heads:
        c.refuse("num_heads beside x [B, S, H * D]", "none")
    width = c.integer("rotary_embedding_dim", 0)
    half = (width or (x.shape[-1] // heads if packed else x.shape[-1])) // 2
    cos, sin = cos[..., :half], sin[..., :half]
    inner = bool(c.integer("interleaved", 0))
    if not packed:
        return _rotate(x, cos.unsqueeze(1), sin.unsqueeze(1), inner)
    batch, length, size = x.shape
    apart = x.reshape(batch, length, heads, size // heads)
    return _rotate(apart, cos.unsqueeze(2), sin.unsqueeze(2), inner).reshape(x.shape)


def _grouped(c: Call) -> Result:
    """GroupQueryAttention of ONNX Runtime, causal, its cache yet to be written."""
    c.allow("smooth_softmax", 0, -1)
    heads, kv_heads = c.integer("num_heads", 1), c.integer("kv_num_heads", 1)
    q, k, v = _projections(c, heads, kv_heads)
    _check_fresh(c, q.shape[1])
    inner = bool(c.integer("rotary_interleaved", 0))
    if c.integer("do_rotary", 0):
        places = c.maybe(9)
        positions = torch.arange(q.shape[1]).unsqueeze(0) if places is None else places
        cos, sin = (_angles(c.tensor(at), positions).unsqueeze(2) for at in (7, 8))
        q, k = _rotate(q, cos, sin, inner), _rotate(k, cos, sin, inner)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    window, softcap = c.integer("local_window_size", -1), c.number("softcap", 0.0)
    scale = c.number("scale", 0.0) or 1 / math.sqrt(q.shape[3])
    limits = (window if window > 0 else None, None, softcap or None)
    out = hooked(q, k, v, c.maybe(11), c.maybe(10), scale, True, *limits)
    batch, length = out.shape[:2]
    return out.reshape(batch, length, -1), k, v


def _projections(c: Call, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, H, D], k and v [B, S, G, D], which may come as one."""
    q, k, v = c.tensor(0), c.maybe(1), c.maybe(2)
    batch, length, size = q.shape
    if k is None or v is None:
        width = size // (heads + 2 * kv_heads)
        q, k, v = torch.split(q, [heads * width, kv_heads * width, kv_heads * width], dim=-1)
    return (
        q.reshape(batch, length, heads, -1),
        k.reshape(batch, length, kv_heads, -1),
        v.reshape(batch, length, kv_heads, -1),
    )


def _check_fresh(c: Call, length: int) -> None:
    """That the new tokens are all that there are."""
    last, queries = c.value(5), c.value(_QUERY_LENGTHS)
    fresh = isinstance(last, Known) and all(same(item, length - 1) for item in last.items)
    whole = queries is None or (
        isinstance(queries, Known) and all(same(item, length) for item in queries.items)
    )
    if not fresh or not whole:
        c.refuse(
            "the caches of a decoder, in inputs past_key_values.N.key and .value, that is run over "
            "one whole sequence",
            "a cache that may hold tokens already",
        )


RULES: dict[str, Rule] = {"Attention": _attention, "RotaryEmbedding": _rotary}
MICROSOFT: dict[str, Rule] = {
    "GroupQueryAttention": _grouped,
    "RotaryEmbedding": _rotary_microsoft,
}

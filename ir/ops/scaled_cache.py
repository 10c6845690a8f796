"""A paged KV cache of codes: the ops of a plain one (cache.py, append_kv.py) with a scale beside
the codes of each token and KV head.

A cache is then two: codes [N, P, G, D], int8 or float8 (e4m3), and scales f32[N, P, G, 1]; a
row of D codes stands for ``codes * scale``. ``quantize_rows`` makes both of a row, out of it alone:
nothing is calibrated, and no request has a part in another one's numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dims import Size
from ..dtypes import DType
from ..node import Node
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType, TupleType
from .append_kv import APPEND_KV, turned, turned_flops
from .cache import PAGED_ATTENTION, PAGED_ATTRS, attend_pages, paged_flops, write_rows
from .quant import LARGEST, QUANTIZE_ROWS, rounding_flops


def _codes_fit(op: str, *caches: tuple[TensorType, TensorType]) -> None:
    """(codes, scales) fit each other, and all codes are of one type; else GraphError."""
    for codes, scales in caches:
        if codes.dtype not in LARGEST or codes.dtype is not caches[0][0].dtype:
            raise ill_typed(op, "codes [N, P, G, D], both i8 or both f8e4m3", codes)
        wide = scales.dtype in (DType.F32, DType.F64)  # f64 where a graph is widened
        if not wide or scales.shape != (*codes.shape[:-1], 1):
            raise ill_typed(op, "a scale for each row of codes, f32[N, P, G, 1]", codes, scales)


def _attention_type(
    q: TensorType,
    k_cache: TensorType,
    v_cache: TensorType,
    block_tables: TensorType,
    seq_lens: TensorType,
    query_start: TensorType | None,
    sinks: TensorType | None,
    alibi: TensorType | None,
    k_scale: TensorType,
    v_scale: TensorType,
    q_sinks: TensorType | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    num_sinks: int | None = None,
) -> TensorType:
    _codes_fit("scaled_paged_attention", (k_cache, k_scale), (v_cache, v_scale))
    plain = (cache.with_dtype(q.dtype) for cache in (k_cache, v_cache))
    found = PAGED_ATTENTION.infer(
        *(q, *plain, block_tables, seq_lens, query_start, sinks, alibi, q_sinks),
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        num_sinks=num_sinks,
    )
    assert isinstance(found, TensorType)
    return found


def _attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi: torch.Tensor | None,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    q_sinks: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    num_sinks: int | None = None,
) -> torch.Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32

    def rows(pages: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pairs = ((k_cache, k_scale), (v_cache, v_scale))
        return tuple(_picked(codes, pages).to(wide) * s[pages].to(wide) for codes, s in pairs)

    out = q.new_zeros(*q.shape[:2], v_cache.shape[3])
    metadata = (block_tables, seq_lens, query_start)
    attrs: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap}
    attrs["num_sinks"] = num_sinks
    return attend_pages(
        q, rows, k_cache.shape[1], out, metadata, sinks, alibi, q_sinks, scale=scale, **attrs
    )


def _picked(codes: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """``codes[pages]``, which torch has not for 8-bit floats on every device."""
    if codes.dtype.itemsize > 1:
        return codes[pages]
    return codes.view(torch.uint8)[pages].view(codes.dtype)


def _append_type(
    k: TensorType,
    v: TensorType,
    k_cache: TensorType,
    v_cache: TensorType,
    k_scale: TensorType,
    v_scale: TensorType,
    slot_mapping: TensorType,
    q: TensorType | None = None,
    cos: TensorType | None = None,
    sin: TensorType | None = None,
    q_weight: TensorType | None = None,
    k_weight: TensorType | None = None,
    *,
    layout: str = "half",
    eps: float | None = None,
    stepwise: bool | None = None,
    tries: int | None = None,
) -> TupleType:
    _codes_fit("scaled_append_kv", (k_cache, k_scale), (v_cache, v_scale))
    for new in (k, v):
        QUANTIZE_ROWS.infer(new, dtype=k_cache.dtype, tries=tries)
    plain = (k_cache.with_dtype(k.dtype), v_cache.with_dtype(v.dtype))
    rest = (slot_mapping, q, cos, sin, q_weight, k_weight)
    APPEND_KV.infer(k, v, *plain, *rest, layout=layout, eps=eps, stepwise=stepwise)
    caches = (k_cache, v_cache, k_scale, v_scale)
    return caches if q is None else (*caches, q)


def append_codes(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    slot_mapping: torch.Tensor,
    q: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    *,
    layout: str = "half",
    eps: float | None = None,
    stepwise: bool | None = None,
    tries: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """``scaled_append_kv`` into the contiguous caches it is given, which it returns."""
    attrs: dict[str, Any] = {"layout": layout, "eps": eps, "stepwise": stepwise}
    new_k = turned(k, k_weight, cos, sin, **attrs)
    for new, codes, scales in ((new_k, k_cache, k_scale), (v, v_cache, v_scale)):
        kind = DType.from_torch(codes.dtype)
        made = QUANTIZE_ROWS.reference(new, dtype=kind, tries=tries)
        for cache, rows in zip((codes, scales), made, strict=True):
            write_rows(cache, rows, slot_mapping)
    caches = (k_cache, v_cache, k_scale, v_scale)
    return caches if q is None else (*caches, turned(q, q_weight, cos, sin, **attrs))


def _append(
    k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor | None, **attrs: Any
) -> tuple[torch.Tensor, ...]:
    contiguous = torch.contiguous_format
    caches = (x.clone(memory_format=contiguous) for x in rest[:4] if x is not None)
    return append_codes(k, v, *caches, *rest[4:], **attrs)


def _append_flops(node: Node) -> Size:
    """As ``append_kv``, and as ``quantize_rows`` for each element that becomes a code."""
    k, v, q, cos, q_weight, k_weight = (node.args[i] for i in (0, 1, 7, 8, 10, 11))
    assert k is not None and v is not None
    rounding = rounding_flops(node.attr("tries"))
    return turned_flops(k, q, cos, q_weight, k_weight) + (k.type.numel + v.type.numel) * rounding


def _append_moved(node: Node) -> Size:
    """The new rows read, their codes and scales written, q there and back, tables, weights and
    slots; not the whole caches.
    """
    total: Size = 0
    for index, arg in enumerate(node.args):
        if arg is None or 2 <= index < 6:
            continue
        total = total + arg.type.nbytes * (2 if index == 7 else 1)
        if index < 2:
            tokens, heads, width = arg.shape
            total = total + tokens * heads * (width * node.types[index].dtype.bytes + 4)
    return total


def _x(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _cached(
    generator: torch.Generator, dtype: DType, *shape: int
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = QUANTIZE_ROWS.reference(_x(generator, *shape), dtype=dtype)
    # Powers of two, which stay as they are in every element type.
    return codes, scales.log2().round().exp2()


def _attention_samples(g: torch.Generator) -> list[Sample]:
    tables = torch.tensor([[3, 1, 0], [2, 0, 0]], dtype=torch.int32)
    lens, starts = (torch.tensor(x, dtype=torch.int32) for x in ([7, 2], [0, 3, 4]))
    found = []
    for dtype in LARGEST:
        (k, k_scale), (v, v_scale) = (_cached(g, dtype, 5, 4, 2, width) for width in (8, 6))
        ragged = (_x(g, 4, 4, 8), k, v, tables, lens, starts)
        decode = (_x(g, 2, 4, 8), k, v, tables, lens, None)
        found += [
            Sample((*ragged, None, None, k_scale, v_scale), {"scale": 0.3}),
            Sample(
                (*decode, _x(g, 4), None, k_scale, v_scale),
                {"scale": 0.3, "window": 3, "softcap": 4.0},
            ),
            Sample(
                (*ragged, None, None, k_scale, v_scale, _x(g, 4, 4, 8)),
                {"scale": 0.3, "window": 2, "num_sinks": 2},
            ),
        ]
    return found


def _append_samples(g: torch.Generator) -> list[Sample]:
    found = []
    for dtype in LARGEST:
        (k, k_scale), (v, v_scale) = (_cached(g, dtype, 3, 4, 2, width) for width in (8, 6))
        new = (_x(g, 2, 2, 8), _x(g, 2, 2, 6), k, v, k_scale, v_scale, torch.tensor([5, 11]))
        tables, weights = (_x(g, 2, 4), _x(g, 2, 4)), (_x(g, 8), _x(g, 8))
        found += [Sample(new), Sample((*new, _x(g, 2, 4, 8), *tables, *weights), {"eps": 1e-5})]
    found.append(Sample(new, {"tries": 8}))
    return found


SCALED_PAGED_ATTENTION = register(
    OpSchema(
        "scaled_paged_attention",
        (
            *("q", "k_cache", "v_cache", "block_tables", "seq_lens"),
            *("query_start?", "sinks?", "alibi?", "k_scale", "v_scale", "q_sinks?"),
        ),
        _attention_type,
        _attention,
        PAGED_ATTRS,
        paged_flops,
        _attention_samples,
    )
)
"""``paged_attention`` over what codes stand for. Its other operands are in the same places."""

SCALED_APPEND_KV = register(
    OpSchema(
        "scaled_append_kv",
        (
            *("k", "v", "k_cache", "v_cache", "k_scale", "v_scale", "slot_mapping"),
            *("q?", "cos?", "sin?", "q_weight?", "k_weight?"),
        ),
        _append_type,
        _append,
        (*APPEND_KV.attrs, "tries"),
        _append_flops,
        _append_samples,
        aliases=((0, 2), (1, 3), (2, 4), (3, 5)),
        moved=_append_moved,
    )
)
"""``k_cache, v_cache, k_scale, v_scale[, q]``: as ``append_kv``, with the rows as
``quantize_rows`` makes them with these ``tries``: k after it is turned and rounded to its element
type.
"""

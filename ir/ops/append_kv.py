"""What stands between the projections and paged attention, as one op: norms of the heads, rotary
embedding, and the rows of this step written into a paged cache.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dims import Size
from ..node import Node
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType, TupleType
from .cache import KV_WRITE, write_rows
from .norm import RMS_NORM, ROPE


def _append_type(
    k: TensorType,
    v: TensorType,
    k_cache: TensorType,
    v_cache: TensorType,
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
) -> TupleType:
    for cache, new in ((k_cache, k), (v_cache, v)):
        KV_WRITE.infer(cache, new, slot_mapping)
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ill_typed("append_kv", "caches [N, P, G, D] and [N, P, G, E]", k_cache, v_cache)
    if (q_weight is None and k_weight is None) is not (eps is None):
        raise ill_typed("append_kv", "eps where there is a weight", q_weight, k_weight)
    if q is None and q_weight is not None:
        raise ill_typed("append_kv", "q with its weight", q_weight)
    tables = None if cos is None and sin is None else (cos, sin)
    if tables is None and layout != "half":  # one spelling of a call that turns nothing
        raise ill_typed("append_kv", "layout where there are cos and sin", k)
    if stepwise is not None and tables is None and eps is None:
        raise ill_typed("append_kv", "a norm or rope where it is stepwise", k)
    for x, weight in ((k, k_weight), (q, q_weight)):
        if x is None:
            continue
        if x.rank != 3 or (x.shape[0], x.shape[2]) != (k.shape[0], k.shape[2]):
            raise ill_typed("append_kv", "q [T, H, D] and k [T, G, D]", x, k)
        if weight is not None:
            RMS_NORM.infer(x, weight, eps=eps, stepwise=stepwise)
        if tables is not None:
            rows = (_table_type(table, k) for table in tables)
            ROPE.infer(x, *rows, layout=layout, stepwise=stepwise)
    return (k_cache, v_cache) if q is None else (k_cache, v_cache, q)


def _table_type(table: TensorType | None, k: TensorType) -> TensorType:
    """The table as rope takes it: [T, 1, R/2]."""
    if table is None or table.rank != 2 or table.shape[0] != k.shape[0]:
        raise ill_typed("append_kv", "cos and sin [T, R/2]", table, k)
    return table.with_shape((table.shape[0], 1, table.shape[1]))


def append_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
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
) -> tuple[torch.Tensor, ...]:
    """``append_kv`` into the contiguous caches it is given, which it returns."""
    attrs: dict[str, Any] = {"layout": layout, "eps": eps, "stepwise": stepwise}
    write_rows(k_cache, turned(k, k_weight, cos, sin, **attrs), slot_mapping)
    write_rows(v_cache, v, slot_mapping)
    caches = (k_cache, v_cache)
    return caches if q is None else (*caches, turned(q, q_weight, cos, sin, **attrs))


def turned(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    layout: str,
    eps: float | None,
    stepwise: bool | None,
) -> torch.Tensor:
    """``rope(rms_norm(x, weight), cos, sin)`` of x [T, heads, D], either may be absent."""
    y = x if weight is None else _one(RMS_NORM, x, weight, eps=eps, stepwise=stepwise)
    if cos is None or sin is None:
        return y
    return _one(ROPE, y, cos[:, None], sin[:, None], layout=layout, stepwise=stepwise)


def _one(spec: OpSchema, *args: torch.Tensor, **attrs: object) -> torch.Tensor:
    result = spec.reference(*args, **attrs)
    assert isinstance(result, torch.Tensor)
    return result


def _append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *rest: Any,
    **attrs: Any,
) -> tuple[torch.Tensor, ...]:
    contiguous = torch.contiguous_format
    k_new, v_new = (cache.clone(memory_format=contiguous) for cache in (k_cache, v_cache))
    return append_rows(k, v, k_new, v_new, *rest, **attrs)


def turned_flops(
    k: Node,
    q: Node | None,
    cos: Node | None,
    q_weight: Node | None,
    k_weight: Node | None,
) -> Size:
    """As ``rms_norm`` and ``rope`` count: 6 and 3 an element."""
    total: Size = 0
    for x, weight in ((k, k_weight), (q, q_weight)):
        if x is not None:
            an_element = (0 if weight is None else 6) + (0 if cos is None else 3)
            total = total + x.type.numel * an_element
    return total


def _flops(node: Node) -> Size:
    k, q, cos, q_weight, k_weight = (node.args[i] for i in (0, 5, 6, 8, 9))
    assert k is not None
    return turned_flops(k, q, cos, q_weight, k_weight)


def _moved(node: Node) -> Size:
    """The new rows read and written, tables, weights and slots; not the whole caches."""
    total: Size = 0
    for index, arg in enumerate(node.args):
        if arg is not None and index not in (2, 3):
            total = total + arg.type.nbytes * (2 if index in (0, 1, 5) else 1)
    return total


def _x(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _samples(g: torch.Generator) -> list[Sample]:
    caches = (_x(g, 3, 4, 2, 8), _x(g, 3, 4, 2, 6))
    new = (_x(g, 2, 2, 8), _x(g, 2, 2, 6), *caches, torch.tensor([5, 11]))
    q, whole, part = _x(g, 2, 4, 8), (_x(g, 2, 4), _x(g, 2, 4)), (_x(g, 2, 2), _x(g, 2, 2))
    weights = (_x(g, 8), _x(g, 8))
    return [
        Sample(new),
        Sample((*new, q, *whole)),
        Sample((*new, q, *part), {"layout": "interleaved"}),
        Sample((*new, None, *part)),
        Sample((*new, q, *whole, *weights), {"eps": 1e-5}),
        Sample((*new, q, *part, None, weights[1]), {"eps": 1e-5, "layout": "interleaved"}),
        Sample((*new, q, None, None, *weights), {"eps": 1e-5}),
        Sample((*new, q, *whole, *weights), {"eps": 1e-5, "stepwise": True}),
    ]


APPEND_KV = register(
    OpSchema(
        "append_kv",
        (
            *("k", "v", "k_cache", "v_cache", "slot_mapping"),
            *("q?", "cos?", "sin?", "q_weight?", "k_weight?"),
        ),
        _append_type,
        _append,
        ("layout", "eps", "stepwise"),
        _flops,
        _samples,
        aliases=((0, 2), (1, 3)),
        moved=_moved,
    )
)
"""``k_cache, v_cache[, q]``: rows ``rope(rms_norm(k))`` and ``v`` at ``slot_mapping``, and
``rope(rms_norm(q))``; without a weight no norm, without cos and sin no rope; ``stepwise`` is that
of both.
"""

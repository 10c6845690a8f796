"""Attention: torch's scaled_dot_product_attention, and the ops that capture emits in its place."""

from __future__ import annotations

import math

import torch

from ...ir.build import cast, make, permute, reshape
from ...ir.dims import Size, product
from ...ir.dtypes import DType
from ...ir.node import Node
from .base import Call, Rule, as_node, scalar
from .create import positions
from .shape import expand


def visible_keys(
    queries: Size, keys: Size, causal: bool, window: int | None, chunk: int | None
) -> Node | None:
    """bool [queries, keys], query i standing at i + keys - queries; None when all are visible."""
    row, column = positions(queries, keys)
    if keys != queries:
        row = make("add", row, as_node(keys - queries, DType.I64))
    tests = []
    if causal:
        tests.append(make("le", column, row))
    if window is not None:
        tests.append(make("gt", column, make("sub", row, scalar(window, row))))
    if chunk is not None:
        blocks = [make("floordiv", x, scalar(chunk, x)) for x in (column, row)]
        tests.append(make("eq", *blocks))
    found = None
    for test in tests:
        found = test if found is None else make("logical_and", found, test)
    return found


def _four(x: Node) -> Node:
    """[..., H, S, D] as [B, H, S, D]."""
    if x.type.rank == 4:
        return x
    return reshape(x, product(x.shape[:-3]), *((1,) * (3 - x.type.rank)), *x.shape[-3:])


def _sdpa(c: Call) -> Node | None:
    q, k, v = c.tensor("query"), c.tensor("key"), c.tensor("value")
    if q.type.rank < 2 or c.args.get("dropout_p", 0.0) != 0.0:
        return None
    lead = c.type.shape[:-3] if q.type.rank > 3 else ()
    if lead:
        k, v = (expand(x, (*lead, *x.shape[-3:])) for x in (k, v))
        q = expand(q, (*lead, *q.shape[-3:]))
    queries, keys = q.shape[-2], k.shape[-2]
    mask, causal = c.maybe("attn_mask"), c.flag("is_causal")
    if mask is not None and mask.dtype not in (DType.BOOL, q.dtype):
        mask = cast(mask, q.dtype)
    if mask is not None and mask.type.rank > 4:
        mask = _four(expand(mask, (*lead, *mask.shape[-3:])))
    if causal and queries != keys:
        # torch aligns the triangle at the first key, the op at the last
        row, column = positions(queries, keys)
        mask, causal = make("le", column, row), False
    scale = c.number("scale") if c.given("scale") else _default_scale(q)
    out = _attention(_four(q), _four(k), _four(v), mask, causal=causal, scale=scale)
    return reshape(out, *c.type.shape)


def _default_scale(q: Node) -> float:
    width = q.shape[-1]
    return 1 / math.sqrt(width) if isinstance(width, int) else math.nan


def _attention(
    q: Node,
    k: Node,
    v: Node,
    mask: Node | None = None,
    sinks: Node | None = None,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
) -> Node:
    attrs = {"window": window, "softcap": softcap, "causal": True if causal else None}
    return make("attention", q, k, v, mask, sinks, scale=float(scale), **attrs)


def _hooked(c: Call) -> Node:
    """tilewright::attention, whose result is [B, S, H, D]."""
    q, k, v = c.tensor("q"), c.tensor("k"), c.tensor("v")
    mask = c.maybe("bias", q.dtype)
    causal, window = c.flag("is_causal"), _optional(c, "window")
    if c.given("chunk"):
        seen = visible_keys(q.shape[2], k.shape[2], False, None, c.integer("chunk"))
        mask = seen if mask is None or seen is None else _hidden(mask, seen, -math.inf)
    softcap = c.number("softcap") if c.given("softcap") else None
    out = _attention(
        q,
        k,
        v,
        mask,
        c.maybe("sinks", q.dtype),
        scale=c.number("scale"),
        causal=causal,
        window=window,
        softcap=softcap,
    )
    return permute(out, 0, 2, 1, 3)


def _mask_scores(c: Call) -> Node:
    scores = c.tensor("scores")
    window, chunk = _optional(c, "window"), _optional(c, "chunk")
    queries, keys = scores.shape[-2:]
    seen = visible_keys(queries, keys, c.flag("is_causal"), window, chunk)
    lowest = torch.finfo(scores.dtype.torch).min
    return scores if seen is None else _hidden(scores, seen, lowest)


def _hidden(scores: Node, seen: Node, lowest: float) -> Node:
    return make("where", seen, scores, scalar(lowest, scores))


def _optional(c: Call, name: str) -> int | None:
    return c.integer(name) if c.given(name) else None


RULES: dict[str, Rule] = {
    "aten.scaled_dot_product_attention": _sdpa,
    "tilewright.attention": _hooked,
    "tilewright.mask_scores": _mask_scores,
}

"""KV-cache insertion: a decoder without a cache becomes one over ragged tokens that reads and
writes a cache.

Two forms of one rewrite: pages for backends that address memory freely, slots for those with
static shapes.
"""

from __future__ import annotations

from functools import partial

from ..errors import UnsupportedError
from ..ir.build import input_node, item, make
from ..ir.dims import Size, symbol
from ..ir.dtypes import DType
from ..ir.graph import Graph
from ..ir.node import Attr, Node
from ..ir.types import TensorType
from .base import Pass
from .cache_samples import adapt_to_pages, adapt_to_slots, same_logits
from .kv_cache_check import over_codes
from .pick_rows import pick_rows
from .ragged import Ragged

T, B, M, N, P, R, L = map(symbol, "TBMNPRL")
TRIES = {DType.F8E4M3: 8}
"""Scales that are tried for a row of codes. Of int8 the least is the best: its grid is even."""


def insert_paged_cache(graph: Graph, codes: DType | None = None) -> Graph:
    """Rewrites causal attention over [1, S] to paged attention over ragged tokens.

    Before::

        def decoder(input_ids: i64[1, S]):
            ...
            attention_0: f32[1, 4, S, 8] = attention(q, k, v, causal=True, scale=0.35)

    After::

        def decoder(token_ids: i64[T], positions: i64[T], query_start: i32[B + 1], seq_lens: i32[B],
                    slot_mapping: i64[T], block_tables: i32[B, M], logits_indices: i64[R],
                    k_cache_0: f32[N, P, 2, 8], v_cache_0: f32[N, P, 2, 8]):
            kv_write_0: f32[N, P, 2, 8] = kv_write(k_cache_0, k, slot_mapping)
            kv_write_1: f32[N, P, 2, 8] = kv_write(v_cache_0, v, slot_mapping)
            paged_attention_0: f32[T, 4, 8] = paged_attention(q, kv_write_0, kv_write_1,
                block_tables, …)

    With ``codes``, i8 or f8e4m3, the caches hold codes, and more caches their scales::

            quantize_rows_0: (f8e4m3[T, 2, 8], f32[T, 2, 1],) = quantize_rows(k, dtype=f8e4m3,
                tries=8)
            item_0, item_1 = item(quantize_rows_0, index=0), …
            kv_write_0: f8e4m3[N, P, 2, 8] = kv_write(k_cache_0, item_0, slot_mapping)
            kv_write_1: f32[N, P, 2, 1] = kv_write(k_scale_0, item_1, slot_mapping)
            …
            scaled_paged_attention_0: f32[T, 4, 8] = scaled_paged_attention(q, kv_write_0,
                kv_write_2, block_tables, …, kv_write_1, kv_write_3)

    Raises:
        UnsupportedError: tokens mix outside causal attention; the message names the node.
    """
    return _insert(graph, _PagedCaches(codes))


def insert_slot_cache(graph: Graph) -> Graph:
    """Rewrites causal attention over [1, S] to attention over slots: row b of each cache is
    sequence b.

    Before::

        attention_0: f32[1, 4, S, 8] = attention(q, k, v, causal=True, scale=0.35)

    After::

        slot_attention_0: (f32[T, 4, 8], f32[B, 2, L, 8], f32[B, 2, L, 8],) = slot_attention(
            q, k, v, k_cache_0, v_cache_0, seq_lens, scale=0.35)

    Raises:
        UnsupportedError: tokens mix outside causal attention; the message names the node.
    """
    return _insert(graph, _SlotCaches())


PAGED_CACHE = Pass("paged-cache", insert_paged_cache, adapt_to_pages, same_logits)
SLOT_CACHE = Pass("slot-cache", insert_slot_cache, adapt_to_slots, same_logits)


def paged_cache_pass(codes: DType | None) -> Pass:
    """``insert_paged_cache`` with caches of these codes; None for numbers."""
    if codes is None:
        return PAGED_CACHE
    return Pass(
        PAGED_CACHE.name,
        partial(insert_paged_cache, codes=codes),
        adapt_to_pages,
        same_logits,
        partial(over_codes, codes, TRIES.get(codes)),
    )


class _PagedCaches:
    """Makes the cache inputs and calls of the paged form, and keeps what each layer leaves
    behind.
    """

    def __init__(self, codes: DType | None = None) -> None:
        self.codes = codes
        self.metadata = {
            "query_start": input_node("query_start", TensorType(DType.I32, (B + 1,))),
            "seq_lens": input_node("seq_lens", TensorType(DType.I32, (B,))),
            "slot_mapping": input_node("slot_mapping", TensorType(DType.I64, (T,))),
            "block_tables": input_node("block_tables", TensorType(DType.I32, (B, M))),
        }
        self.layers = 0
        self.caches: dict[str, tuple[Node, Node]] = {}

    def attend(self, node: Node, q: Node, k: Node, v: Node) -> Node:
        layer, self.layers = self.layers, self.layers + 1
        tables, lens, starts = (
            self.metadata[name] for name in ("block_tables", "seq_lens", "query_start")
        )
        extra = node.args[4:6]
        if self.codes is None:
            caches = [self._write(f"{x}_cache_{layer}", new) for x, new in (("k", k), ("v", v))]
            rest = (tables, lens, starts, *extra)
            return make("paged_attention", q, *caches, *rest, **_attrs(node))
        tries = TRIES.get(self.codes)
        parts = [make("quantize_rows", new, dtype=self.codes, tries=tries) for new in (k, v)]
        codes, scales = (
            [
                self._write(f"{x}_{name}_{layer}", item(part, index))
                for x, part in zip("kv", parts, strict=True)
            ]
            for index, name in enumerate(("cache", "scale"))
        )
        rest = (tables, lens, starts, *extra, *scales)
        return make("scaled_paged_attention", q, *codes, *rest, **_attrs(node))

    def _write(self, name: str, new: Node) -> Node:
        cache = input_node(name, TensorType(new.dtype, (N, P, *new.shape[1:])))
        written = make("kv_write", cache, new, self.metadata["slot_mapping"])
        self.caches[name] = (cache, written)
        return written


class _SlotCaches:
    """The same for slots of a static length."""

    def __init__(self) -> None:
        self.metadata = {"seq_lens": input_node("seq_lens", TensorType(DType.I32, (B,)))}
        self.caches: dict[str, tuple[Node, Node]] = {}

    def attend(self, node: Node, q: Node, k: Node, v: Node) -> Node:
        layer = len(self.caches) // 2
        names = (f"k_cache_{layer}", f"v_cache_{layer}")
        olds = [input_node(name, _slot_type(new)) for name, new in zip(names, (k, v), strict=True)]
        lens, extra = self.metadata["seq_lens"], node.args[4:6]
        call = make("slot_attention", q, k, v, *olds, lens, *extra, **_attrs(node))
        for i, (name, old) in enumerate(zip(names, olds, strict=True)):
            self.caches[name] = (old, item(call, i + 1))
        return item(call, 0)


def _slot_type(new: Node) -> TensorType:
    return TensorType(new.dtype, (B, new.shape[1], L, new.shape[2]))


def _attrs(node: Node) -> dict[str, Attr]:
    return dict(node.attrs)


def _insert(graph: Graph, caches: _PagedCaches | _SlotCaches) -> Graph:
    ids, logits = _signature(graph)
    token_ids = input_node("token_ids", TensorType(ids.dtype, (T,)))
    positions = input_node("positions", TensorType(DType.I64, (T,)))
    wanted = input_node("logits_indices", TensorType(DType.I64, (R,)))
    state = Ragged(graph, ids, token_ids, positions, caches.attend)
    rows = make("index_select", state.new[logits], wanted, dim=0)
    inputs = (token_ids, positions, *caches.metadata.values(), wanted)
    whole = Graph(
        graph.name,
        inputs + tuple(old for old, _ in caches.caches.values()),
        (rows, *(new for _, new in caches.caches.values())),
        graph.weights,
        ("logits", *caches.caches),
    )
    return pick_rows(whole, rows)


def _signature(graph: Graph) -> tuple[Node, Node]:
    """The ids and logits of a causal LM: one input i64[1, S], one output [1, S, V]."""
    ids, logits = graph.inputs[0], graph.outputs[0]
    sequence: Size = ids.shape[1] if ids.type.rank == 2 else 0
    fits = ids.shape[:1] == (1,) and logits.shape[:2] == (1, sequence) and logits.type.rank == 3
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or isinstance(sequence, int) or not fits:
        raise UnsupportedError(
            f"graph {graph.name}",
            expected="a causal LM: token ids i64[1, S] in, logits [1, S, V] out, S dynamic",
            found=f"{_types(graph.inputs)} in, {_types(graph.outputs)} out",
            remedy="Compile it as a plain module with kv_cache=None.",
        )
    return ids, logits


def _types(nodes: tuple[Node, ...]) -> str:
    return ", ".join(str(node.type) for node in nodes)

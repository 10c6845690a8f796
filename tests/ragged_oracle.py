"""Shared by the tests of cache passes: a tiny decoder as text, and steps over it with a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tilewright.ir.graph import Graph, input_name
from tilewright.ir.interpreter import interpret

DECODER = """
def decoder(input_ids: i64[1, S]):
    embed: f32[16, 8] = param("embed")
    table: f32[32, 8] = param("table")
    gain: f32[8] = param("gain")
    wq: f32[16, 8] = param("wq")
    wk: f32[8, 8] = param("wk")
    wv: f32[8, 8] = param("wv")
    wo: f32[8, 16] = param("wo")
    words: f32[1, S, 8] = embedding(embed, input_ids)
    rows: f32[S, 8] = slice(table, dim=0, start=0, stop=S)
    x: f32[1, S, 8] = add(words, rows)
    n: f32[1, S, 8] = rms_norm(x, gain, eps=1e-05)
    q: f32[1, S, 16] = linear(n, wq)
    k: f32[1, S, 8] = linear(n, wk)
    v: f32[1, S, 8] = linear(n, wv)
    q4: f32[1, S, 4, 4] = reshape(q, shape=(1, S, 4, 4))
    k4: f32[1, S, 2, 4] = reshape(k, shape=(1, S, 2, 4))
    v4: f32[1, S, 2, 4] = reshape(v, shape=(1, S, 2, 4))
    qh: f32[1, 4, S, 4] = permute(q4, dims=(0, 2, 1, 3))
    kh: f32[1, 2, S, 4] = permute(k4, dims=(0, 2, 1, 3))
    vh: f32[1, 2, S, 4] = permute(v4, dims=(0, 2, 1, 3))
    p: i64[S] = iota(size=S, dtype=i64)
    pf: f32[S] = cast(p, dtype=f32)
    column: f32[1, 1, S, 1] = reshape(pf, shape=(1, 1, S, 1))
    angle: f32[1, 1, S, 2] = expand(column, shape=(1, 1, S, 2))
    c: f32[1, 1, S, 2] = cos(angle)
    s: f32[1, 1, S, 2] = sin(angle)
    qr: f32[1, 4, S, 4] = rope(qh, c, s, layout="half")
    kr: f32[1, 2, S, 4] = rope(kh, c, s, layout="half")
    a: f32[1, 4, S, 4] = attention(qr, kr, vh, causal=True, scale=0.5, window=6)
    at: f32[1, S, 4, 4] = permute(a, dims=(0, 2, 1, 3))
    flat: f32[1, S, 16] = reshape(at, shape=(1, S, 16))
    o: f32[1, S, 8] = linear(flat, wo)
    y: f32[1, S, 8] = add(x, o)
    final: f32[1, S, 8] = rms_norm(y, gain, eps=1e-05)
    logits: f32[1, S, 16] = linear(final, embed)
    return {"logits": logits}
"""


class PagedRun:
    """Steps of a paged graph over caches that hold NaN wherever nothing was written."""

    def __init__(self, graph: Graph, num_pages: int, page_size: int) -> None:
        self.graph, self.page_size = graph, page_size
        sizes = {"N": num_pages, "P": page_size}
        self.caches = {
            input_name(node): torch.full(
                [s if isinstance(s, int) else sizes[str(s)] for s in node.shape],
                torch.nan if node.dtype.is_float else 1.0,
            ).to(node.dtype.torch)
            for node in graph.inputs
            if "_cache_" in input_name(node) or "_scale_" in input_name(node)
        }

    def step(self, chunks: Sequence[tuple[torch.Tensor, int, Sequence[int]]]) -> list[torch.Tensor]:
        """Logits of each chunk (ids, tokens before them, pages of the sequence)."""
        positions = [torch.arange(past, past + len(ids)) for ids, past, _ in chunks]
        slots = [
            torch.tensor(
                [pages[p // self.page_size] * self.page_size + p % self.page_size for p in at]
            )
            for at, (_, _, pages) in zip((p.tolist() for p in positions), chunks, strict=True)
        ]
        counts = [len(ids) for ids, _, _ in chunks]
        width = max(len(pages) for _, _, pages in chunks)
        given: Mapping[str, torch.Tensor] = {
            "token_ids": torch.cat([ids for ids, _, _ in chunks]),
            "positions": torch.cat(positions),
            "slot_mapping": torch.cat(slots),
            "seq_lens": torch.tensor([past + len(ids) for ids, past, _ in chunks]).int(),
            "query_start": torch.tensor([0, *counts]).cumsum(0).int(),
            "block_tables": torch.tensor(
                [[*pages, *[0] * (width - len(pages))] for _, _, pages in chunks]
            ).int(),
            "logits_indices": torch.arange(sum(counts)),
            **self.caches,
        }
        outputs = interpret(self.graph, [given[input_name(node)] for node in self.graph.inputs])
        results = dict(zip(self.graph.output_names, outputs, strict=True))
        self.caches = {name: results[name] for name in self.caches}
        return list(results["logits"].split(counts))

"""A window with sinks: what the pass puts in, literal StreamingLLM in float64 over a layer, and
what it declines.
"""

from __future__ import annotations

import pytest
import torch

from ragged_oracle import DECODER, PagedRun
from rewriting import parse
from tilewright.errors import UnsupportedError
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.verifier import verify
from tilewright.passes.fuse_append import fuse_append
from tilewright.passes.kv_cache import paged_cache_pass
from tilewright.passes.one_token import one_token, takes_one_token
from tilewright.passes.sinks import Window, slide_window
from tilewright.passes.token_rows import check_rows

pytestmark = pytest.mark.quick
ROTATED = DECODER.replace(
    "x: f32[1, S, 8] = add(words, rows)", "x: f32[1, S, 8] = mul(words, words)"
)
FULL = ROTATED.replace(", window=6)", ")")
KINDS = pytest.mark.parametrize("codes", [None, DType.I8], ids=str)


def paged(text: str, codes: DType | None = None) -> Graph:
    return paged_cache_pass(codes).run(parse(text))


@KINDS
def test_golden(codes: DType | None) -> None:
    before = paged(FULL, codes)
    after = verify(slide_window(before, Window(20, 3)))
    text = str(after)
    assert "minimum_0: i64[T] = minimum(positions, i64(22))" in text
    assert text.count(" = rope(") == 3
    assert ", rope_2, causal=True, num_sinks=3, scale=0.5, window=20)" in text
    assert after.inputs == before.inputs and after.output_names == before.output_names
    check_rows(after)
    assert takes_one_token(after)
    assert "num_sinks=3" in str(verify(one_token(after)))
    fused = str(verify(fuse_append(after)))
    assert "append_kv(" in fused and "num_sinks=3" in fused and fused.count(" = rope(") == 1


def test_a_narrower_window_stays_as_it_is() -> None:
    before = paged(ROTATED)
    assert slide_window(before, Window(6, 3)) == before
    assert "num_sinks=3, scale=0.5, window=5)" in str(slide_window(before, Window(5, 3)))


def test_without_sinks_there_is_the_window_alone() -> None:
    text = str(slide_window(paged(FULL), Window(20, 0)))
    assert "causal=True, scale=0.5, window=20)" in text and "minimum" not in text


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [..., S, 4] by angles that are positions themselves."""
    cos, sin = (
        f(positions.double())[..., None].expand(*positions.shape, 2) for f in (torch.cos, torch.sin)
    )
    a, b = x.split(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def streamed(graph: Graph, ids: torch.Tensor, window: Window) -> torch.Tensor:
    """Logits of StreamingLLM as its paper has it: each query over a cache of sinks and window, all
    rotated by their places in the cache.
    """
    w = {name: weight.load().double() for name, weight in graph.weights.items()}

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w["gain"]

    x = w["embed"][ids].square()
    n = norm(x)
    q, k, v = (torch.unflatten(n @ w[m].T, -1, (-1, 4)).transpose(0, 1) for m in ("wq", "wk", "wv"))
    k, v = (x.repeat_interleave(2, 0) for x in (k, v))
    rows = []
    for p in range(len(ids)):
        kept = [j for j in range(p + 1) if j < window.sinks or j > p - window.size]
        places = torch.arange(len(kept))
        scores = rotated(q[:, p : p + 1], places[-1:]) @ rotated(k[:, kept], places).transpose(1, 2)
        rows.append(((scores * 0.5).softmax(-1) @ v[:, kept]).flatten())
    return norm(x + torch.stack(rows) @ w["wo"].T) @ w["embed"].T


def test_it_is_streaming_llm() -> None:
    before, window = parse(FULL.replace("f32", "f64")), Window(6, 2)
    graph = slide_window(paged_cache_pass(None).run(before), window)
    ids = torch.randint(16, (31,))
    run = PagedRun(graph, 12, 4)
    pages = list(range(11, 1, -1))
    found = [run.step([(ids[a:b], a, pages)])[0] for a, b in ((0, 5), (5, 6), (6, 20), (20, 31))]
    wanted = streamed(before, ids, window)
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "text, found",
    [
        (DECODER, "f32[32, 8], of which each position takes a row"),
        (FULL.replace("attention(qr, kr", "attention(qh, kr"), "without rotary embedding"),
        (FULL.replace("rope(qh, c, s,", "rope(qh, same, same,").replace(
            "    qr:", "    angles: f32[1, 1, 1, 2] = param(\"angles\")\n"
            "    same: f32[1, 1, S, 2] = expand(angles, shape=(1, 1, S, 2))\n    qr:"),
         "the same for all tokens"),
    ],
    ids=["learned", "none", "constant"],
)  # fmt: skip
def test_other_positions_are_declined(text: str, found: str) -> None:
    with pytest.raises(UnsupportedError, match=found.replace("[", r"\[")):
        slide_window(paged(text), Window(20, 3))


def test_slopes_are_declined() -> None:
    text = FULL.replace("    a: f32", '    slopes: f32[4] = param("slopes")\n    a: f32')
    text = text.replace("attention(qr, kr, vh,", "attention(qr, kr, vh, None, None, slopes,")
    with pytest.raises(UnsupportedError, match="ALiBi"):
        slide_window(paged(text), Window(20, 3))

"""one_token: the decode graph computes what the general one does for each token by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriting import parse
from tilewright.errors import GraphError
from tilewright.ir.graph import input_name
from tilewright.ir.interpreter import interpret
from tilewright.ir.verifier import verify
from tilewright.passes.one_token import each_by_itself, one_token, takes_one_token

TEXT = """
def g(x: f32[T, 8], w: f32[8], slots: i64[T], tables: i32[B, M], lens: i32[B],
      query_start: i32[B + 1], logits_indices: i64[R], positions: i64[T],
      k_cache: f32[N, P, 2, 4], v_cache: f32[N, P, 2, 4]):
    q: f32[T, 2, 4] = reshape(x, shape=(T, 2, 4))
    kn: f32[N, P, 2, 4] = kv_write(k_cache, q, slots)
    vn: f32[N, P, 2, 4] = kv_write(v_cache, q, slots)
    a: f32[T, 2, 4] = paged_attention(q, kn, vn, tables, lens, query_start, scale=0.3)
    r: f32[T, 8] = reshape(a, shape=(T, 8))
    picked: f32[R, 8] = embedding(r, logits_indices)
    n: f32[R, 8] = rms_norm(picked, w, eps=1e-06)
    return {"logits": n, "k_cache": kn, "v_cache": vn}
"""
GOLDEN = """
def g(x: f32[B, 8], w: f32[8], slots: i64[B], tables: i32[B, M], lens: i32[B], positions: i64[B],
      k_cache: f32[N, P, 2, 4], v_cache: f32[N, P, 2, 4]):
    q: f32[B, 2, 4] = reshape(x, shape=(B, 2, 4))
    kn: f32[N, P, 2, 4] = kv_write(k_cache, q, slots)
    vn: f32[N, P, 2, 4] = kv_write(v_cache, q, slots)
    a: f32[B, 2, 4] = paged_attention(q, kn, vn, tables, lens, scale=0.3)
    r: f32[B, 8] = reshape(a, shape=(B, 8))
    n: f32[B, 8] = rms_norm(r, w, eps=1e-06)
    return {"logits": n, "k_cache": kn, "v_cache": vn}
"""
WITH_NAMES = TEXT.replace("tables", "block_tables").replace("lens", "seq_lens")


@pytest.mark.quick
def test_two_inputs_go_and_all_rows_are_sequences() -> None:
    found = one_token(parse(TEXT))
    verify(found)
    assert found == parse(GOLDEN)
    assert takes_one_token(parse(TEXT))


def test_a_known_page_size_takes_the_place_of_its_symbol() -> None:
    found = one_token(parse(TEXT), page_size=16)
    assert found == parse(GOLDEN.replace("[N, P,", "[N, 16,"))


@settings(max_examples=20, deadline=None)
@given(lens=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_each_token_by_itself_gives_the_same_numbers(lens: list[int], seed: int) -> None:
    """Whole prompts of several sequences: the logits and the caches of all their tokens."""
    before = parse(WITH_NAMES)
    after = one_token(before)
    generator = torch.Generator().manual_seed(seed)
    tokens, page, width = sum(lens), 4, 3
    tables = torch.randperm(len(lens) * width, generator=generator).view(-1, width) + 1
    rows = [(b, p) for b, n in enumerate(lens) for p in range(n)]
    starts = torch.tensor([0, *lens]).cumsum(0)
    pages = 1 + len(lens) * width
    given = {
        "x": torch.randn(tokens, 8, generator=generator),
        "w": torch.randn(8, generator=generator),
        "slots": torch.tensor([tables[b, p // page] * page + p % page for b, p in rows]),
        "block_tables": tables.to(torch.int32),
        "seq_lens": torch.tensor(lens, dtype=torch.int32),
        "query_start": starts.to(torch.int32),
        "logits_indices": torch.arange(tokens),
        "positions": torch.tensor([p for _, p in rows]),
        "k_cache": torch.full((pages, page, 2, 4), torch.nan),
        "v_cache": torch.full((pages, page, 2, 4), torch.nan),
    }
    inputs = [given[input_name(node)] for node in before.inputs]
    wanted = interpret(before, inputs)
    found = interpret(after, each_by_itself(before, after, inputs))
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(
    "line",
    [
        "extra: i32[B + 1] = add(query_start, query_start)",
        "extra: i64[R] = add(logits_indices, logits_indices)",
        "extra: f32[R, 8] = index_select(w2, logits_indices, dim=1)",
    ],
)
def test_other_readers_of_what_would_go_keep_the_graph_general(line: str) -> None:
    text = TEXT.replace("def g(", "def g(w2: f32[R, 8], ", 1)
    if "dim=1" in line:
        line = "extra: f32[8, R] = index_select(w3, logits_indices, dim=1)"
        text = text.replace("w2: f32[R, 8]", "w3: f32[8, 40]")
    text = text.replace("    return {", f"    {line}\n    return {{").replace(
        '"v_cache": vn', '"v_cache": vn, "extra": extra'
    )
    graph = parse(text)
    assert not takes_one_token(graph)
    with pytest.raises(GraphError):
        one_token(graph)


def test_an_input_that_would_go_and_is_an_output_keeps_the_graph_general() -> None:
    text = TEXT.replace('"v_cache": vn', '"v_cache": vn, "starts": query_start')
    assert not takes_one_token(parse(text))

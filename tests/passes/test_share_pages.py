"""share_pages: decode attention is told of shared pages, where it may read them once."""

from __future__ import annotations

import pytest
import torch

from rewriting import parse
from tilewright.ir.interpreter import interpret
from tilewright.ir.schema import schema
from tilewright.ir.verifier import verify
from tilewright.passes.share_pages import share_pages, with_groups

TEXT = """
def g(q: f32[B, 2, 4], k: f32[N, P, 2, 4], v: f32[N, P, 2, 4], block_tables: i32[B, M],
      lens: i32[B]):
    a: f32[B, 2, 4] = paged_attention(q, k, v, block_tables, lens, scale=0.3)
    b: f32[B, 2, 4] = paged_attention(a, k, v, block_tables, lens, scale=0.3, window=3)
    c: f32[B, 2, 4] = paged_attention(b, k, v, block_tables, lens, scale=0.3, softcap=5.0)
    return {"out": c}
"""
GOLDEN = """
def g(q: f32[B, 2, 4], k: f32[N, P, 2, 4], v: f32[N, P, 2, 4], block_tables: i32[B, M],
      lens: i32[B], group_rows: i32[B], group_ids: i32[B], shared_pages: i32[B]):
    t: i32[B, M] = share_pages(block_tables, group_rows, group_ids, shared_pages)
    a: f32[B, 2, 4] = paged_attention(q, k, v, t, lens, scale=0.3)
    b: f32[B, 2, 4] = paged_attention(a, k, v, block_tables, lens, scale=0.3, window=3)
    c: f32[B, 2, 4] = paged_attention(b, k, v, t, lens, scale=0.3, softcap=5.0)
    return {"out": c}
"""


def inputs_of(tables: list[list[int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = len(tables)
    caches = [torch.randn(9, 4, 2, 4, generator=generator) for _ in "kv"]
    lens = torch.tensor([9 + b for b in range(count)], dtype=torch.int32)
    tables_ = torch.tensor(tables, dtype=torch.int32)
    return [torch.randn(count, 2, 4, generator=generator), *caches, tables_, lens]


@pytest.mark.quick
def test_attention_that_sees_all_keys_is_told() -> None:
    found = share_pages(parse(TEXT))
    verify(found)
    assert found == parse(GOLDEN)


@pytest.mark.parametrize(
    "change",
    [
        ("scale=0.3)", "scale=0.3, window=3)"),
        ("k: f32[N, P, 2, 4]", "alibi: f32[2], k: f32[N, P, 2, 4]"),
        ("lens, scale", "lens, starts, scale"),
    ],
)
def test_others_are_left_as_they_are(change: tuple[str, str]) -> None:
    text = TEXT.replace(", softcap=5.0", "").replace(*change)
    if "alibi" in change[1]:
        text = text.replace("lens, scale", "lens, None, None, alibi, scale")
    if "starts" in change[1]:
        text = text.replace("lens: i32[B])", "lens: i32[B], starts: i32[B + 1])")
    graph = parse(text)
    assert share_pages(graph) == graph
    assert with_groups(graph, graph, ()) == ()


def test_groups_change_no_number_and_wrong_ones_do() -> None:
    before = parse(TEXT)
    after = share_pages(before)
    for tables in ([[1, 2, 3], [1, 2, 4], [1, 2, 5]], [[1, 2, 3], [6, 7, 8]]):
        given = inputs_of(tables)
        told = with_groups(before, after, given)
        wanted = interpret(before, given)
        assert all(map(torch.equal, interpret(after, told), wanted))
        assert int(told[-1][0]) == (2 if len(tables) == 3 else 0)
    wrong = [*told[:-2], torch.ones_like(told[-2]), torch.full_like(told[-1], 2)]
    assert not torch.allclose(interpret(after, wrong)[0], wanted[0])


def test_the_first_of_a_group_gives_its_pages_to_the_others() -> None:
    """A sequence alone gives them to itself, which torch refuses to do in place."""
    share = schema("share_pages").reference
    tables = torch.tensor([[3, 1, 0], [5, 6, 0], [7, 2, 4]], dtype=torch.int32)
    rows = torch.tensor([2, 0, 1], dtype=torch.int32)
    for ids, pages, wanted in (
        ([1, 1, 0], [2, 0, 2], [[7, 2, 0], [5, 6, 0], [7, 2, 4]]),
        ([1, 0, 0], [0, 0, 2], tables.tolist()),
        ([1, 1, 2], [1, 2, 1], [[7, 1, 0], [5, 6, 0], [7, 2, 4]]),
    ):
        groups = (rows, *(torch.tensor(x, dtype=torch.int32) for x in (ids, pages)))
        assert share(tables, *groups).tolist() == wanted
    one = torch.ones(1, dtype=torch.int32)
    assert share(tables[:1], one - 1, one, one).tolist() == [[3, 1, 0]]

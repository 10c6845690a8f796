"""Groups of sequences that share pages: what they are, how long they hold, and that an engine that
decodes by them gives the tokens of sequences alone.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewright as tw
from e2e.models import GPT, VOCAB, greedy_without_cache, moved_off_init
from tilewright.runtime import executor, prefix_groups
from tilewright.runtime.batch import DecodeBatches
from tilewright.runtime.decode_graphs import EagerDecode
from tilewright.runtime.pool import PagedPool
from tilewright.runtime.prefix_groups import PrefixGroups, find_groups
from tilewright.runtime.request import Request
from tilewright.runtime.scheduler import Chunk, Plan

PAGE = 4
PARAMS = tw.SamplingParams(max_new_tokens=2, ignore_eos=True)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group costs nothing."""
    monkeypatch.setattr(prefix_groups, "_GROUP_COST", 0)


def tables_of(paths: list[str]) -> np.ndarray:
    """Tables of the pages that letters name: one that differs makes all behind it others."""
    known: dict[str, int] = {}
    width = max(map(len, paths)) + 1
    tables = np.zeros((len(paths), width), np.int32)
    for row, path in enumerate(paths):
        for place in range(len(path)):
            tables[row, place] = known.setdefault(path[: place + 1], len(known) + 1)
    return tables


def members_of(found: PrefixGroups) -> dict[tuple[int, ...], int]:
    """The pages that each group shares."""
    groups: dict[int, list[int]] = {}
    for row, group in zip(found.rows.tolist(), found.ids.tolist(), strict=True):
        if group:
            groups.setdefault(group, []).append(row)
    assert sorted(found.rows.tolist()) == list(range(len(found.rows)))
    ids = [group for group in found.ids.tolist() if group]
    assert ids == sorted(ids) and found.ids.tolist()[: len(ids)] == ids
    return {tuple(sorted(rows)): int(found.pages[rows[0]]) for rows in groups.values()}


PATHS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=2, max_size=6)


@given(PATHS, st.data())
def test_groups_share_full_pages_and_save_the_most(free, paths, data) -> None:
    tables = tables_of(paths)
    # The token lies in the last page, which no other sequence has unless it is full.
    positions = [data.draw(st.integers(len(p) * PAGE - PAGE, len(p) * PAGE)) for p in paths]
    found = find_groups(tables, positions, PAGE, 1)
    groups = {} if found is None else members_of(found)
    for rows, pages in groups.items():
        assert len(rows) > 1 and pages > 0
        assert all((tables[r, :pages] == tables[rows[0], :pages]).all() for r in rows)
        assert all(positions[r] >= pages * PAGE for r in rows)
    saved = sum((len(rows) - 1) * pages * PAGE for rows, pages in groups.items())
    assert saved == (0 if found is None else found.saved) == best_of(paths, positions)
    if found is not None:
        alone = set(range(len(paths))) - {r for rows in groups for r in rows}
        assert not found.pages[sorted(alone)].any()


def best_of(paths: list[str], positions: list[int]) -> int:
    """The most that any way to part the sequences saves, by trying all."""
    count = len(paths)
    full = [positions[i] // PAGE for i in range(count)]

    def shared(rows: tuple[int, ...]) -> int:
        common = 0
        while all(common < min(len(paths[r]), full[r]) for r in rows) and (
            len({paths[r][: common + 1] for r in rows}) == 1
        ):
            common += 1
        return common

    def best(rest: tuple[int, ...]) -> int:
        if not rest:
            return 0
        first, others = rest[0], rest[1:]
        most = best(others)
        for size in range(1, len(others) + 1):
            for some in itertools.combinations(others, size):
                left = tuple(r for r in others if r not in some)
                most = max(most, size * shared((first, *some)) * PAGE + best(left))
        return most

    return best(tuple(range(count)))


def test_by_hand(free) -> None:
    tables = tables_of(["aab", "x", "aac", "y", "aad"])
    found = find_groups(tables, [9, 3, 10, 3, 8], PAGE, 1)
    assert members_of(found) == {(0, 2, 4): 2} and found.saved == 2 * 2 * PAGE
    assert found.rows.tolist()[3:] == [1, 3] and found.pages.tolist() == [2, 0, 2, 0, 2]


def test_what_saves_too_little_is_left_alone(free, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, positions = tables_of(["ab", "ac", "d"]), [5, 6, 4]
    assert find_groups(tables, positions, PAGE, PAGE) is not None
    assert find_groups(tables, positions, PAGE, PAGE + 1) is None
    monkeypatch.setattr(prefix_groups, "_GROUP_COST", PAGE)
    assert find_groups(tables, positions, PAGE, 0) is None
    assert find_groups(tables[:1], positions[:1], PAGE, 0) is None


def test_groups_hold_while_the_sequences_are_the_same(free) -> None:
    pool = PagedPool(20, PAGE)
    first = Request([1] * 9, PARAMS, frozenset(), 40, None).sequences[0]
    pool.add(first.id)
    pool.append(first.id, 9)
    second = Request([1] * 9, PARAMS, frozenset(), 40, None).sequences[0]
    pool.fork(first.id, second.id)
    pool.append(second.id, 1)
    batches = DecodeBatches(pool, 1)

    def groups(*copies, at=9, seqs=(first, second)):
        plan = Plan([Chunk(seq, at, [0]) for seq in seqs], list(copies))
        return batches.build(plan, None).groups

    found = groups()
    assert found is not None and members_of(found) == {(0, 1): 2}
    assert groups(at=10) is found and groups(at=12) is found  # a page is new: tables are not these
    assert groups((1, 2)) is not found
    assert groups(seqs=(first,)) is None
    batches.forget()
    assert groups() is not found
    assert DecodeBatches(pool).build(Plan([Chunk(first, 9, [0])], []), None).groups is None


def test_an_engine_that_decodes_by_groups_gives_the_tokens_of_each(
    free, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the interpreter; what the sequences have in common ends inside a page."""
    torch.manual_seed(3)
    gpt = moved_off_init(GPT(width=32, heads=2, layers=1))
    example = (torch.zeros(1, 8, dtype=torch.int64),)
    options = {"kv_cache": tw.KVCacheConfig(page_size=PAGE), "verify": "off", "target": "cpu"}
    monkeypatch.setattr(executor, "SHARED_BYTES", 0)
    engine = tw.compile(gpt, example, backend="triton", max_batch_size=4, **options)
    assert shared_steps(engine, monkeypatch, gpt) == [2]
    # By default so few bytes are not worth it: keys and values of 32 float32 a token.
    monkeypatch.setattr(executor, "SHARED_BYTES", 16 << 20)
    wanted = engine.executor._shared_tokens()
    assert wanted == (16 << 20) // (2 * 32 * 4)


def shared_steps(engine: tw.Engine, monkeypatch: pytest.MonkeyPatch, gpt: GPT) -> list[int]:
    """Sequences of each step by groups, of two prompts whose tokens are right."""
    seen: list[int] = []
    graph = EagerDecode._graph

    def watched(self, shape, *, shared=False):
        seen.extend([shape.sequences] * shared)
        return graph(self, shape, shared=shared)

    monkeypatch.setattr(EagerDecode, "_graph", watched)
    common = [(7 * i) % VOCAB for i in range(9)]
    prompts = [[*common, 5], [*common, 7, 8]]
    engine.generate([common], tw.SamplingParams(max_new_tokens=1))
    found = [completion.token_ids for completion in engine.generate(prompts, PARAMS)]
    assert found == [greedy_without_cache(gpt, prompt, 2) for prompt in prompts]
    monkeypatch.setattr(EagerDecode, "_graph", graph)
    return seen

"""Groups of sequences that share pages: what they are, how long they hold, and that an engine that
decodes by them gives the tokens of sequences alone.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewright as tw
from e2e.models import GPT, VOCAB, greedy_without_cache, moved_off_init
from fake_decode import LazyExecutor
from fake_executor import VOCAB as FAKE_VOCAB
from fake_executor import greedy as fake_greedy
from tilewright.compiler.engine_checks import _compare, _lm_steps
from tilewright.compiler.inspect.facts import final_graph
from tilewright.errors import VerificationError
from tilewright.runtime import GenerationLoop, Sampler, Scheduler, executor
from tilewright.runtime.batch import DecodeBatches
from tilewright.runtime.decode_graphs import EagerDecode
from tilewright.runtime.pool import PagedPool
from tilewright.runtime.prefix_groups import PrefixGroups, fewest_sharing, find_groups
from tilewright.runtime.request import Request
from tilewright.runtime.runner import ProgramRunner
from tilewright.runtime.scheduler import Chunk, Plan

PAGE = 4
PARAMS = tw.SamplingParams(max_new_tokens=2, ignore_eos=True)
ALWAYS = -(1 << 40)  # what groups cost, for all to pay


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
def test_groups_share_full_pages_and_save_the_most(paths, data) -> None:
    tables = tables_of(paths)
    # The token lies in the last page, which no other sequence has unless it is full.
    positions = [data.draw(st.integers(len(p) * PAGE - PAGE, len(p) * PAGE)) for p in paths]
    found = find_groups(tables, positions, PAGE, ALWAYS)
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


def test_by_hand() -> None:
    tables = tables_of(["aab", "x", "aac", "y", "aad"])
    found = find_groups(tables, [9, 3, 10, 3, 8], PAGE, ALWAYS)
    assert members_of(found) == {(0, 2, 4): 2} and found.saved == 2 * 2 * PAGE
    assert found.rows.tolist()[3:] == [1, 3] and found.pages.tolist() == [2, 0, 2, 0, 2]


# 32 query and 8 KV heads of 128 in bfloat16, on an H200 (benchmarks/NOTES.md): sequences of each
# group, tokens that a group shares, and the microseconds of attention without groups and with.
MEASURED = (
    ((64,), 8192, 288.3, 61.9),
    ((32, 32), 8192, 289.4, 64.1),
    ((16,), 8192, 79.2, 37.9),
    ((64,), 1024, 46.4, 36.5),
    ((4,), 8192, 24.9, 33.2),
    ((64,), 256, 20.2, 36.1),
    ((8,), 512, 9.9, 18.5),
    ((2,), 1024, 8.2, 15.6),
)


@pytest.mark.parametrize(("groups", "shared", "plain", "cascade"), MEASURED)
def test_groups_pay_where_they_were_measured_to(groups, shared, plain, cascade) -> None:
    """With 128 tokens of each sequence behind what it shares, in pages of 16."""
    least, count = executor.SHARED_BYTES // (2 * 8 * 128 * 2), sum(groups)
    paths = [np.full(shared // 16, g + 1) for g, n in enumerate(groups) for _ in range(n)]
    own = 100 + np.arange(count * 9).reshape(count, 9)
    tables = np.concatenate([np.stack(paths), own], axis=1).astype(np.int32)
    positions = [shared + 125] * count
    found = find_groups(tables, positions, 16, least)
    assert (found is not None) == (cascade < plain)
    assert found is None or sorted(map(len, members_of(found))) == sorted(groups)


def test_what_groups_cost_is_held_against_what_they_save() -> None:
    tables, positions = tables_of(["abc", "abd", "abe", "xy"]), [8, 9, 10, 5]
    saved, tokens = 2 * 2 * PAGE, sum(positions)
    found = find_groups(tables, positions, PAGE, 2 * saved - tokens)
    assert found is not None and found.saved == saved
    assert find_groups(tables, positions, PAGE, 2 * saved - tokens + 1) is None
    assert not found.pay(tokens + 1, 2 * saved - tokens)
    assert find_groups(tables[:1], positions[:1], PAGE, ALWAYS) is None
    # A group more costs an eighth of the whole.
    paths = ["a" * 9 + end for end in "abcdef"] + ["xy", "xz"]
    tables, positions = tables_of(paths), [37] * 6 + [5, 5]
    for least, groups in ((0, 2), (7 * PAGE, 2), (8 * PAGE, 1)):
        assert len(members_of(find_groups(tables, positions, PAGE, least))) == groups


@given(PATHS, st.integers(-9, 60))
def test_fewer_sequences_than_the_fewest_never_share(paths, least) -> None:
    tables, positions = tables_of(paths), [len(path) * PAGE for path in paths]
    found = find_groups(tables, positions, PAGE, least)
    assert found is None or len(paths) >= fewest_sharing(max(positions), least)


def test_groups_hold_while_the_sequences_are_the_same() -> None:
    pool = PagedPool(20, PAGE)
    first = Request([1] * 9, PARAMS, frozenset(), 40, None).sequences[0]
    pool.add(first.id)
    pool.append(first.id, 9)
    second = Request([1] * 9, PARAMS, frozenset(), 40, None).sequences[0]
    pool.fork(first.id, second.id)
    pool.append(second.id, 1)
    batches = DecodeBatches(pool, ALWAYS)

    def plan(*copies, at=9, seqs=(first, second)):
        for seq in seqs:
            seq.num_computed = at
        return Plan([Chunk(seq, at, [0]) for seq in seqs], list(copies)).gathered()

    def groups(*copies, **of):
        return batches.build(plan(*copies, **of), None).groups

    found = groups()
    assert found is not None and members_of(found) == {(0, 1): 2}
    assert groups(at=10) is found and groups(at=12) is found  # a page is new: tables are not these
    assert groups((1, 2)) is not found
    assert groups(seqs=(first,)) is None
    batches.forget()
    assert groups() is not found
    batches = DecodeBatches(pool, 2 * found.saved - 20)
    assert groups(at=10) is not None and groups(at=11) is None and groups(at=10) is None
    assert DecodeBatches(pool).build(plan(seqs=(first,)), None).groups is None


@pytest.mark.parametrize(
    ("least", "buckets"),
    [(ALWAYS, {2, 4, 8, 16}), (5 * 48, {8, 16}), (15 * 48, set()), (None, set())],
)
def test_graphs_of_steps_by_groups_are_captured_before_requests(
    monkeypatch: pytest.MonkeyPatch, least: int | None, buckets: set[int]
) -> None:
    monkeypatch.setattr(LazyExecutor, "_shared_tokens", lambda self: least)
    fake, pool = LazyExecutor(16, 48), PagedPool(99, PAGE, prefix_caching=True)
    scheduler = Scheduler(pool, fake.capabilities)
    loop = GenerationLoop(fake, pool, scheduler, Sampler(), None, [], 48, FAKE_VOCAB)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(fake.runner, "device", torch.device("cuda"))
        on_a_gpu.setattr(fake, "_rehearse", lambda: None)
        fake.warm_up()
    graphs = fake.graphs
    assert graphs.captured.keys() == {1, 2, 4, 8, 16} and graphs.shared.keys() == buckets
    before = dict(graphs.captured), dict(graphs.shared)
    common = list(range(1, 10))
    loop.generate([common], tw.SamplingParams(max_new_tokens=1))
    found = loop.generate([[*common, i] for i in range(5)], PARAMS)
    assert [one.token_ids for (one,) in found] == [fake_greedy([*common, i], 2) for i in range(5)]
    assert (graphs.captured, graphs.shared) == before
    assert (fake.decoding.shared_runs > 0) == (least == ALWAYS)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(3)
    return moved_off_init(GPT(width=32, heads=2, layers=1))


@pytest.fixture(scope="module")
def engine(gpt: GPT) -> tw.Engine:
    """In the interpreter, by groups wherever pages are shared."""
    example = (torch.zeros(1, 8, dtype=torch.int64),)
    options = {"kv_cache": tw.KVCacheConfig(page_size=PAGE), "verify": "off", "target": "cpu"}
    with pytest.MonkeyPatch.context() as always:
        always.setattr(executor, "SHARED_BYTES", ALWAYS)
        return tw.compile(gpt, example, backend="triton", max_batch_size=4, **options)


def test_an_engine_that_decodes_by_groups_gives_the_tokens_of_each(
    gpt: GPT, engine: tw.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the sequences have in common ends inside a page."""
    assert shared_steps(engine, monkeypatch, gpt) == [2]
    # By default so few bytes are not worth it: keys and values of 32 float32 a token.
    assert engine.executor._shared_tokens() == executor.SHARED_BYTES // (2 * 32 * 4)


def test_what_reads_shared_pages_once_is_verified(engine: tw.Engine) -> None:
    """By a step of 8 sequences that share a page; a call that takes keys for values is found."""
    _, (_, image, steps) = _lm_steps(engine.image)
    name, make = steps[-1]
    assert name == "8 sequences that share a page"
    graph, random = final_graph(image), torch.Generator().manual_seed(0)
    before = {
        cache: torch.randn(5, *tensor.shape[1:], generator=random)
        for cache, tensor in engine.executor.caches.tensors.items()
    }
    weights = {name: weight.load() for name, weight in image.weights.items()}
    inputs = make(graph, before)
    calls = [
        replace(call, operands=_swapped(call.operands)) if "/cascade-" in call.kernel else call
        for call in image.program.calls
    ]
    wrong = replace(image.program, calls=tuple(calls))
    right, spoiled = (
        ProgramRunner(program, weights, engine.image.files.__getitem__)
        for program in (image.program, wrong)
    )
    error, _ = _compare(name, graph, right, weights, inputs)
    assert error < 1e-4
    with pytest.raises(VerificationError, match=name):
        _compare(name, graph, spoiled, weights, inputs)


def _swapped(operands: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Keys for values."""
    q, k, v, *others = operands
    return (q, v, k, *others)


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

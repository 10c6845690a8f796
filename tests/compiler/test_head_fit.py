"""Shared keys and values: exact copies are found, errors are what they say, groups are the best."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from head_layers import HEADS, HIDDEN, KINDS, LENGTH, WIDTH, attention_layer
from tilewright.compiler.heads.fit import Freedom, fit, lost, roots_of, weights_within
from tilewright.compiler.heads.grouping import distances, grouped
from tilewright.compiler.heads.moments import moments_of_weights, moments_on_text
from tilewright.compiler.heads.plan import plan_heads
from tilewright.errors import CheckpointError
from tilewright.formats import Held
from tilewright.passes.heads import GQA, HeadSite, head_sites

pytestmark = pytest.mark.quick

FREEDOMS = {
    "half": Freedom.of(6, ((0, 3), (1, 4), (2, 5))),
    "partial": Freedom.of(6, ((0, 1), (2, 3))),
    "any": Freedom.of(6),
    "fixed": Freedom.of(6, fixed=True),
}
seeds = st.integers(0, 2**20)


def _draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _moments(rows: Tensor) -> Tensor:
    """Of heads [n, D, tokens]."""
    return torch.einsum("hat,jbt->hajb", rows, rows) / rows.shape[-1]


def _costs(seed: int, n: int) -> Tensor:
    root = _draw(seed, n, 6, 6)
    return root @ root.mT


def _random_turn(seed: int, freedom: Freedom) -> Tensor:
    """An orthogonal [D, D] within the freedom."""
    turn = torch.zeros(6, 6, dtype=torch.float64)
    angles = _draw(seed, 6)
    for (a, b), angle in zip(freedom.pairs, angles, strict=False):
        turn[a, a] = turn[b, b] = angle.cos()
        turn[a, b], turn[b, a] = -angle.sin(), angle.sin()
    rest = torch.tensor(freedom.rest, dtype=torch.long)
    turn[rest[:, None], rest] = torch.linalg.qr(_draw(seed + 1, len(rest), len(rest))).Q
    return turn


@pytest.mark.parametrize("method", ["svd", "mean"])
@pytest.mark.parametrize("name", ["half", "partial", "any"])
@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_turned_copies_share_all(name: str, method: str, seed: int):
    freedom, one = FREEDOMS[name], _draw(seed, 6, 40)
    rows = torch.stack([_random_turn(seed + i, freedom) @ one for i in range(3)])
    moments, costs = _moments(rows), weights_within(_costs(seed + 9, 3), freedom)
    found = fit(moments, costs, freedom, method, True)
    loss, whole = lost(moments, costs, found)
    assert loss < 1e-12 * whole
    shared = torch.einsum("ahb,hbt->at", found.pool, rows)
    torch.testing.assert_close(torch.einsum("hba,bt->hat", found.turns, shared), rows)


@pytest.mark.parametrize("name", FREEDOMS)
@given(seed=seeds, n=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_errors_are_those_of_the_vectors_and_svd_loses_least(name: str, seed: int, n: int):
    freedom, rows = FREEDOMS[name], _draw(seed, n, 6, 30)
    moments, costs = _moments(rows), weights_within(_costs(seed + 1, n), freedom)
    losses = []
    for method, align in (("svd", True), ("mean", True), ("mean", False)):
        found = fit(moments, costs, freedom, method, align)
        shared = torch.einsum("ahb,hbt->at", found.pool, rows)
        errors = rows - torch.einsum("hba,bt->hat", found.turns, shared)
        wanted = torch.einsum("hat,hab,hbt->", errors, costs, errors) / rows.shape[-1]
        loss, whole = lost(moments, costs, found)
        assert loss == pytest.approx(wanted.item(), rel=1e-8, abs=1e-9)
        assert whole == pytest.approx(
            torch.einsum("hat,hab,hbt->", rows, costs, rows).item() / rows.shape[-1]
        )
        losses.append(loss)
    assert losses[0] <= min(losses) + 1e-9
    assert losses[0] <= whole


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_turns_commute_with_rotation(seed: int):
    """What queries and keys are multiplied by must not care for positions."""
    freedom, rows = FREEDOMS["half"], _draw(seed, 3, 6, 30)
    costs = weights_within(_costs(seed, 3), freedom)
    rotation = _random_turn(seed + 5, freedom)
    for method in ("svd", "mean"):
        turns = fit(_moments(rows), costs, freedom, method, True).turns
        torch.testing.assert_close(turns @ rotation, rotation @ turns)


def test_roots():
    costs = _costs(1, 3)
    roots, inverses = roots_of(costs)
    torch.testing.assert_close(roots @ roots, costs)
    torch.testing.assert_close(roots @ inverses, torch.eye(6, dtype=torch.float64).repeat(3, 1, 1))


@pytest.mark.parametrize("name", FREEDOMS)
def test_distances_by_hand(name: str):
    freedom, rows = FREEDOMS[name], _draw(3, 3, 6, 50)
    moments = _moments(rows)
    plain = distances(moments, freedom, False)
    size = rows.square().sum((1, 2)).mean()
    for a, b in combinations(range(3), 2):
        wanted = (rows[a] - rows[b]).square().sum() / size
        assert plain[a, b].item() == pytest.approx(wanted.item())
    turned = distances(moments, freedom, True)
    assert (turned <= plain + 1e-9).all()
    assert torch.equal(turned, plain) == (name == "fixed")


@given(seed=seeds, n=st.sampled_from([4, 6, 8]), share=st.sampled_from([2, 3, 4]))
@settings(max_examples=30, deadline=None)
def test_no_exchange_improves_groups(seed: int, n: int, share: int):
    groups = n // share
    if n % share:
        return
    costs = _draw(seed, n, n).abs()
    order = grouped(costs + costs.T, groups)
    assert sorted(order) == list(range(n))
    table = (costs + costs.T).fill_diagonal_(0)

    def cost(heads: tuple[int, ...]) -> float:
        parts = [heads[i * share : (i + 1) * share] for i in range(groups)]
        return sum(table[a, b].item() for part in parts for a, b in combinations(part, 2))

    for a, b in combinations(range(n), 2):
        other = list(order)
        other[a], other[b] = other[b], other[a]
        assert cost(order) <= cost(tuple(other)) + 1e-6
    assert cost(order) <= cost(tuple(range(n))) + 1e-6


def test_twins_meet_and_ties_stay_neighbours():
    twins = torch.ones(6, 6)
    for a, b in ((0, 4), (1, 3), (2, 5)):
        twins[a, b] = twins[b, a] = 0
    order = grouped(twins, 3)
    assert {frozenset(order[i : i + 2]) for i in (0, 2, 4)} == {
        frozenset(pair) for pair in ((0, 4), (1, 3), (2, 5))
    }
    assert grouped(torch.ones(6, 6), 3) == tuple(range(6))


def test_moments_on_text_are_those_of_keys_and_queries():
    graph, x = attention_layer(KINDS["partial"]), _draw(8, 2, LENGTH, HIDDEN)
    (site,) = head_sites(graph)
    assert isinstance(site, HeadSite)
    found = moments_on_text(graph, [site], [(row[None],) for row in x])[site.name]
    loaded = {name: weight.load() for name, weight in graph.weights.items()}
    rows = x.flatten(0, 1)
    keys, queries, values = (
        (rows @ loaded[f"{role}.weight"].T + loaded[f"{role}.bias"]).view(-1, HEADS, WIDTH)
        for role in "kqv"
    )
    count = len(rows)
    for moments, heads in ((found.keys, keys), (found.values, values)):
        torch.testing.assert_close(moments, torch.einsum("tha,tjb->hajb", heads, heads) / count)
    own = torch.einsum("tha,thb->hab", queries, queries) / count
    torch.testing.assert_close(found.queries, own)
    columns = loaded["o.weight"].view(HIDDEN, HEADS, WIDTH)
    torch.testing.assert_close(found.outputs, torch.einsum("nha,nhb->hab", columns, columns))


def test_query_heads_of_one_key_count_together():
    graph = attention_layer(KINDS["gqa"])
    (site,) = head_sites(graph)
    assert isinstance(site, HeadSite)
    found = moments_of_weights(graph, [site])[site.name]
    queries = graph.weights["q.weight"].load().view(2, 2, WIDTH, HIDDEN)
    wanted = torch.einsum("grak,grbk->gab", queries, queries)
    torch.testing.assert_close(found.queries, wanted)


def test_weights_that_are_not_finite_are_named():
    graph = attention_layer(KINDS["mha"])
    broken = graph.weights["v.weight"].load().clone()
    broken[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=re.escape("'v.weight'")):
        plan_heads(graph.with_weights({"v.weight": Held(broken, "v")}), GQA(1))

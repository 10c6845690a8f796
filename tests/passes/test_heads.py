"""KV heads that become fewer: where they can, that turning them loses nothing, that names are
right, and the option.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from head_layers import HEADS, HIDDEN, KINDS, LENGTH, WIDTH, Kind, S, attention_layer, weight
from tilewright.compiler.heads.plan import plan_heads
from tilewright.errors import UnsupportedError, UsageError, VerificationError
from tilewright.ir.build import make, permute, rebuild, reshape
from tilewright.ir.graph import Graph, param_name
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.passes.base import Pass
from tilewright.passes.driver import run_passes
from tilewright.passes.heads import (
    GQA,
    Declined,
    HeadPlan,
    HeadSite,
    LayerMaps,
    convert_heads,
    head_sites,
    heads_pass,
    resolve_heads,
)
from tilewright.passes.merge_projections import MERGE_PROJECTIONS

pytestmark = pytest.mark.quick

X = torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _result(graph: Graph) -> torch.Tensor:
    with torch.no_grad():
        return interpret(graph, (X,))[0]


def _orthogonal(count: int, width: int, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(count, width, width, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise).Q


def _turned(site: HeadSite, generator: torch.Generator) -> LayerMaps:
    """Each head turned at random by what commutes with its rotary embedding, heads shuffled, none
    pooled.
    """
    _, count, width, value_width = site.sizes
    keys = torch.eye(width, dtype=torch.float64).repeat(count, 1, 1)
    if site.turns_keys:
        rotated = [column for pair in site.pairs for column in pair]
        rest = torch.tensor([i for i in range(width) if i not in rotated], dtype=torch.long)
        keys[:, rest[:, None], rest] = _orthogonal(count, len(rest), generator)
        for a, b in site.pairs:
            angle = torch.rand(count, generator=generator, dtype=torch.float64) * 7
            keys[:, a, a] = keys[:, b, b] = angle.cos()
            keys[:, a, b], keys[:, b, a] = -angle.sin(), angle.sin()
    values = _orthogonal(count, value_width, generator)
    order = torch.randperm(count, generator=generator) if not site.apart else torch.arange(count)
    return LayerMaps(tuple(order.tolist()), keys, values, keys, values.mT.contiguous())


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=10, deadline=None)
def test_turns_alone_lose_nothing(kind: str, seed: int):
    graph, generator = attention_layer(KINDS[kind], seed), torch.Generator().manual_seed(seed)
    (site,) = head_sites(graph)
    assert isinstance(site, HeadSite)
    turned = convert_heads(graph, HeadPlan(GQA(1), {site.name: _turned(site, generator)}, {}))
    wanted, found = _result(graph), _result(turned)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    name = param_name(site.output.operands[1])
    assert not torch.equal(turned.weights[name].load(), graph.weights[name].load())


@pytest.mark.parametrize("method", ["svd", "mean"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "gqa"])
def test_the_driver_finds_each_form_right(kind: str, groups: int, method: str):
    graph = attention_layer(KINDS[kind])
    step = heads_pass(plan_heads(graph, GQA(groups, method)))
    found, records = run_passes(graph, [step, MERGE_PROJECTIONS], level="full", samples=(X,))
    assert records[0].max_error is not None and records[0].max_error < 1e-9
    (attention,) = (node for node in found.nodes if node.op == "attention")
    assert [x.shape[1] for x in attention.operands[:3]] == [HEADS, groups, groups]
    products = [node.shape[-1] for node in found.nodes if node.op == "linear"]
    assert products == [(HEADS + 2 * groups) * WIDTH, HIDDEN]


def test_the_plain_mean_by_hand():
    graph = attention_layer(KINDS["mha"])
    plan = plan_heads(graph, GQA(2, "mean", align=False, regroup=False))
    found = convert_heads(graph, plan)
    for role in "kv":
        old = graph.weights[f"{role}.weight"].load().view(2, 2, WIDTH, HIDDEN)
        new = found.weights[f"{role}.weight"].load().view(2, WIDTH, HIDDEN)
        torch.testing.assert_close(new, old.mean(1))
    for name in ("q.weight", "o.weight"):
        assert found.weights[name] == graph.weights[name]


def test_the_driver_refuses_maps_that_are_not_undone():
    graph = attention_layer(KINDS["mha"])
    plan = plan_heads(graph, GQA(2))
    (name, maps), *_ = plan.layers.items()
    assert maps.queries is not None
    wrong = LayerMaps(maps.order, maps.keys, maps.values, -maps.queries, maps.outputs)
    broken = heads_pass(HeadPlan(plan.config, {name: wrong}, {}))
    step = Pass("broken", broken.run, expected=heads_pass(plan).expected)
    with pytest.raises(VerificationError, match="broken"):
        run_passes(graph, [step], level="full", samples=(X,))


def test_groups_must_divide_the_heads():
    with pytest.raises(UsageError, match="one of 1, 2, 4") as caught:
        plan_heads(attention_layer(KINDS["mha"]), GQA(3))
    assert "attention has 4" in str(caught.value)
    assert plan_heads(attention_layer(KINDS["mha"]), GQA(4)).layers == {}


def _rewired(change: Callable[[Node], Node | None]) -> Graph:
    """The plain layer with nodes exchanged."""
    graph, values = attention_layer(Kind()), dict[Node, Node]()
    for node in graph.nodes:
        same = rebuild(node, values)
        values[node] = change(same) or same
    return graph.with_outputs((values[graph.outputs[0]],))


@pytest.mark.parametrize(
    ("op", "change", "reason"),
    [
        ("attention", lambda n: make("neg", n), "a neg stands between its result and a linear"),
        ("permute", lambda n: make("neg", n), "a neg over its heads"),
        (
            "linear",
            lambda n: make("tanh", n) if n.operands[0].op == "input" else None,
            "a tanh over all heads together",
        ),
        (
            "attention",
            lambda n: make("attention", n.operands[0], n.operands[1], n.operands[1], scale=1.0),
            "no projections of their own",
        ),
        (
            "linear",
            lambda n: make("linear", n.operands[0], make("neg", n.operands[1])),
            "are computed",
        ),
        (
            "linear",
            lambda n: (
                make("linear", n.operands[0], weight("q.weight", HIDDEN, HIDDEN))
                if param_name(n.operands[1]) == "o.weight"
                else None
            ),
            "'q.weight' is read in several places",
        ),
        (
            "linear",
            lambda n: (
                make("linear", make("neg", n.operands[0]), n.operands[1])
                if param_name(n.operands[1]) == "k.weight"
                else None
            ),
            "different inputs",
        ),
    ],
)
def test_what_stands_in_the_way_is_named(op: str, change: Callable[[Node], Node], reason: str):
    graph = _rewired(lambda node: change(node) if node.op == op else None)
    (site,) = head_sites(graph)
    assert isinstance(site, Declined) and reason in site.reason
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        plan_heads(graph, GQA(1))


def test_heads_that_others_read_stay():
    graph = attention_layer(Kind())
    (attention,) = (node for node in graph.nodes if node.op == "attention")
    keys = reshape(permute(attention.operands[1], 0, 2, 1, 3), 1, S, HIDDEN)
    both = graph.with_outputs((make("add", graph.outputs[0], keys),))
    (site,) = head_sites(both)
    assert isinstance(site, Declined) and "read by others" in site.reason


def test_the_option():
    assert resolve_heads(None) is None
    assert resolve_heads("mqa") == GQA(1)
    assert resolve_heads("gqa:12") == resolve_heads(GQA(12)) == GQA(12)


@pytest.mark.parametrize(
    "attention",
    ["gqa", "gqa:", "gqa:-1", "gqa:0", "MQA", 3, GQA(0), GQA(True), GQA(1, "median"),
     GQA(1, tokens=-1), GQA(1, align=1), GQA(1, report_tokens=1)],
    ids=str,
)  # fmt: skip
def test_a_wrong_option_is_refused(attention: object):
    with pytest.raises(UsageError):
        resolve_heads(attention)


def test_the_method_follows_from_what_is_known():
    graph = attention_layer(KINDS["mha"])
    assert plan_heads(graph, GQA(2)).config.method == "mean"
    assert plan_heads(graph, GQA(2), [(X,)]).config.method == "svd"

"""KV heads that become fewer: where they can, that turning them loses nothing, that names are
right, and the option.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from tilewright.compiler.heads.plan import plan_heads, recognized
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.compiler.lowering import lower
from tilewright.compiler.sources import open_source
from tilewright.errors import UsageError, VerificationError
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
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
from tilewright.passes.pipeline import pipeline
from tiny_models import tiny_model

IDS = torch.tensor([[3, 50, 7, 111, 9, 120, 41, 2, 2]])
CONVERTED = {
    "llama_mha": (2, 1),
    "llama": (1,),
    "qwen2": (1,),  # biases
    "qwen3": (1,),  # norms of heads
    "gpt2": (2, 1),  # one linear for all, biases, no rotation
    "phi3": (1,),  # one linear for all, rotated
    "stablelm": (1,),  # rotated in part
    "gptj": (2,),  # pairs side by side
    "mpt": (2,),  # slopes: query heads keep their places
    "gemma2": (1,),
}


def _graph(name: str) -> Graph:
    model = tiny_model(name)
    source = open_source(model)
    return recognized(lower(capture_causal_lm(source.module), "g", source.weights))


@pytest.fixture(scope="module")
def graphs() -> Mapping[str, Graph]:
    return {name: _graph(name) for name in CONVERTED}


def _logits(graph: Graph) -> torch.Tensor:
    with torch.no_grad():
        return interpret(graph, (IDS,))[0]


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


@pytest.mark.parametrize("name", CONVERTED)
def test_turns_alone_lose_nothing(graphs: Mapping[str, Graph], name: str):
    graph, generator = graphs[name], torch.Generator().manual_seed(5)
    sites = [site for site in head_sites(graph) if isinstance(site, HeadSite)]
    assert len(sites) == len([n for n in graph.nodes if n.op == "attention"])
    maps = {site.name: _turned(site, generator) for site in sites}
    turned = convert_heads(graph, HeadPlan(GQA(1), maps, {}))
    wanted, found = _logits(graph), _logits(turned)
    assert (wanted - found).abs().max() < 2e-5 * wanted.abs().max()
    assert any(
        not torch.equal(v.load(), graph.weights[k].load())
        for k, v in turned.weights.items()
        if k in graph.weights and v.shape == graph.weights[k].shape
    )


@pytest.mark.parametrize("method", ["svd", "mean"])
@pytest.mark.parametrize(("name", "groups"), [(n, g) for n, gs in CONVERTED.items() for g in gs])
def test_the_driver_finds_each_family_right(
    graphs: Mapping[str, Graph], name: str, groups: int, method: str
):
    graph = graphs[name]
    plan = plan_heads(graph, GQA(groups, method))
    found, (record,) = run_passes(graph, [heads_pass(plan)], level="full", samples=(IDS,))
    assert record.max_error is not None and record.max_error < 2e-5
    assert {n.operands[1].shape[1] for n in found.nodes if n.op == "attention"} == {groups}
    assert found.inputs == graph.inputs
    run_passes(found, pipeline("paged")[8:], level="structure")


def test_the_driver_refuses_maps_that_are_not_undone(graphs: Mapping[str, Graph]):
    graph = graphs["llama_mha"]
    plan = plan_heads(graph, GQA(2))

    def wrong(maps: LayerMaps) -> LayerMaps:
        return LayerMaps(maps.order, maps.keys, maps.values, -maps.queries, maps.outputs)

    broken = HeadPlan(plan.config, {k: wrong(v) for k, v in plan.layers.items()}, {})
    step = Pass("broken", heads_pass(broken).run, expected=heads_pass(plan).expected)
    with pytest.raises(VerificationError, match="broken"):
        run_passes(graph, [step], level="full", samples=(IDS,))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("olmo2", "rms_norm over all heads together"),
        ("olmo", "follows their projection"),
        ("gpt_neox", "is part of no linear"),
    ],
)
def test_what_stands_in_the_way_is_named(name: str, reason: str):
    site = head_sites(_graph(name))[0]
    assert isinstance(site, Declined) and reason in site.reason


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

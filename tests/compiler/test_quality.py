"""The quality report: perplexity and divergence by hand, errors of layers, tables."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewriting import parse
from tilewright.compiler.calibrate.recipe import calibrate
from tilewright.compiler.quality.compare import compare, graph_logits, windows
from tilewright.compiler.quality.dense import with_dense_weights
from tilewright.compiler.quality.layers import layer_errors
from tilewright.compiler.quality.report import assess
from tilewright.compiler.quality.sensitivity import scan
from tilewright.errors import UsageError, VerificationError
from tilewright.ir.interpreter import interpret
from tilewright.passes.quantize import linears_to_quantize, quantize
from tilewright.passes.schemes import QuantConfig, resolve_config
from tilewright.passes.smooth import smooth

pytestmark = pytest.mark.quick

LM = """
def g(ids: i64[1, S]):
    table: f32[11, 8] = param("table")
    x: f32[1, S, 8] = embedding(table, ids)
    w: f32[8, 8] = param("w")
    y: f32[1, S, 8] = linear(x, w)
    logits: f32[1, S, 11] = linear(y, table)
    return {"logits": logits}
"""


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_each_token_is_new_in_one_window(count: int, length: int, data: st.DataObject):
    stride = data.draw(st.integers(1, length - 1))
    new = [i for start, stop, first in windows(count, length, stride) for i in range(first, stop)]
    assert new == list(range(1, count))
    for start, stop, first in windows(count, length, stride):
        assert 0 <= start < first < stop <= count and stop - start <= length


def test_figures_by_hand():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])

    def model(row: int):
        return lambda ids: probabilities[row].log().expand(len(ids), 3)

    found = compare(model(0), model(1), [0, 1, 0, 2, 1], 3, 1)
    assert found.tokens == 4
    wanted = [[1, 0, 2, 1], [0.25, 0.5, 0.25, 0.25], [0.75, 0.125, 0.125, 0.75]]
    base, own = (math.exp(-sum(map(math.log, row)) / 4) for row in wanted[1:])
    assert found.base_perplexity == pytest.approx(base, rel=1e-6)
    assert found.perplexity == pytest.approx(own, rel=1e-6)
    assert found.change == pytest.approx(own / base - 1, rel=1e-5)
    divergence = sum(p * math.log(p / q) for p, q in zip(*probabilities.tolist(), strict=True))
    assert found.kl == pytest.approx(divergence, rel=1e-5)
    assert found.top1 == 0.0
    assert found.to_json()["change"] == found.change


def test_a_model_agrees_with_itself():
    run = graph_logits(parse(LM))
    found = compare(run, run, [1, 2, 3, 4, 5, 6, 7, 8], 4, 2)
    assert (found.kl, found.top1, found.change) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(("ids", "stride"), [([1], 1), ([1, 2], 4), ([1, 2], 0)])
def test_what_cannot_be_measured_is_refused(ids: list[int], stride: int):
    run = graph_logits(parse(LM))
    with pytest.raises(UsageError):
        compare(run, run, ids, 4, stride)


@pytest.mark.parametrize(("broken", "words"), [(0, "the original"), (1, "the quantized")])
def test_logits_that_are_not_finite_are_refused(broken: int, words: str):
    run = graph_logits(parse(LM))

    def bad(ids: torch.Tensor) -> torch.Tensor:
        return run(ids) * float("inf")

    models = [run, run]
    models[broken] = bad
    with pytest.raises(VerificationError, match=words):
        compare(*models, [1, 2, 3, 4, 5], 4, 2)


@pytest.mark.parametrize("scheme", ["int4", "int8", "int8-weight", "fp8"])
def test_errors_of_layers(scheme: str):
    graph = parse(LM)
    config = resolve_config(QuantConfig(scheme, method="rtn"))
    recipe = calibrate(graph, (), config)
    after = quantize(graph, recipe)
    ids = torch.arange(11)[None]
    (error,) = layer_errors(graph, after, recipe, (ids,))
    assert error.name == "w"
    limit = {"int4": 0.2, "fp8": 0.06}.get(scheme, 0.02)
    assert 0 < error.weight < limit and 0 < error.output < limit
    dense = with_dense_weights(after)
    assert not {"dequantize", "scaled_linear"} & {node.op for node in dense.calls()}
    torch.testing.assert_close(interpret(dense, (ids,)), interpret(after, (ids,)))


def test_a_report_says_what_it_measured():
    graph = parse(LM)
    recipe = calibrate(graph, (), resolve_config(QuantConfig("int4")))
    found = assess(graph, recipe, [i % 11 for i in range(40)], "a text", True, longest=16)
    data = found.to_json()
    assert (data["tokens"], data["length"], data["stride"]) == (39, 16, 15)
    assert data["perplexity"] != data["base_perplexity"]
    assert data["layers"][0]["name"] == "w"


TWO_LAYERS = """
def g(ids: i64[1, S]):
    table: f32[11, 8] = param("table")
    x: f32[1, S, 8] = embedding(table, ids)
    norm: f32[8] = param("norm")
    h: f32[1, S, 8] = rms_norm(x, norm, eps=1e-06)
    up: f32[12, 8] = param("up")
    bias: f32[12] = param("bias")
    a: f32[1, S, 12] = linear(h, up, bias)
    b: f32[1, S, 12] = gated(a, a, activation="silu")
    down: f32[8, 12] = param("down")
    c: f32[1, S, 8] = linear(b, down)
    y: f32[1, S, 8] = add(x, c)
    last: f32[8, 8] = param("last[1]")
    z: f32[1, S, 8] = linear(y, last)
    again: f32[1, S, 8] = linear(z, last)
    logits: f32[1, S, 11] = linear(again, table)
    return {"logits": logits}
"""


@pytest.mark.parametrize(
    ("scheme", "method"), [("int4", "rtn"), ("int8", "smoothquant"), ("fp8-tensor", "rtn")]
)
def test_the_scan_is_what_quantizing_each_alone_costs(scheme: str, method: str):
    """The truth: one whole graph for each linear, all others skipped."""
    graph, ids = parse(TWO_LAYERS), torch.arange(40) % 11
    config = resolve_config(QuantConfig(scheme, method=method))
    recipe = calibrate(graph, [(ids[None].flip(1),)], config)
    found = {damage.name: damage for damage in scan(graph, recipe, ids.tolist())}
    assert set(found) == {"up", "down", "last[1]"}
    before = smooth(graph, recipe.smooth)
    (wanted,) = interpret(before, (ids[None],))
    for damage in found.values():
        others = tuple(one.pattern for one in found.values() if one is not damage)
        alone = replace(recipe, config=replace(config, skip=others))
        after = quantize(before, alone)
        assert list(linears_to_quantize(before, alone.config)) == [damage.name]
        (logits,) = interpret(after, (ids[None],))
        p, q = wanted[0].double().log_softmax(-1), logits[0].double().log_softmax(-1)
        kl = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
        assert damage.kl == pytest.approx(kl.item(), rel=1e-3, abs=1e-12) and damage.kl > 0
        held = sum(w.load().nbytes for n, w in after.weights.items() if n.startswith(damage.name))
        assert damage.bytes == before.weights[damage.name].load().nbytes - held


def test_the_scan_puts_first_what_gains_most_for_a_byte():
    graph = parse(TWO_LAYERS)
    recipe = calibrate(graph, (), resolve_config(QuantConfig("int4", group=0)))
    found = scan(graph, recipe, [i % 11 for i in range(40)])
    gains = [damage.kl / damage.bytes for damage in found]
    assert gains == sorted(gains, reverse=True)
    assert all(0 < damage.output < 0.3 for damage in found)

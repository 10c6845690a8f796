"""The quality report: perplexity and divergence by hand, errors of layers, tables."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewriting import parse
from tilewright.compiler.calibrate.recipe import calibrate
from tilewright.compiler.quality.compare import compare, graph_logits, windows
from tilewright.compiler.quality.layers import layer_errors, with_dense_weights
from tilewright.compiler.quality.report import assess
from tilewright.errors import UsageError
from tilewright.ir.interpreter import interpret
from tilewright.passes.quantize import quantize
from tilewright.passes.schemes import QuantConfig, resolve_config

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


@pytest.mark.parametrize("scheme", ["int4", "int8", "int8-weight"])
def test_errors_of_layers(scheme: str):
    graph = parse(LM)
    config = resolve_config(QuantConfig(scheme, method="rtn"))
    recipe = calibrate(graph, (), config)
    after = quantize(graph, recipe)
    ids = torch.arange(11)[None]
    (error,) = layer_errors(graph, after, recipe, (ids,))
    assert error.name == "w"
    limit = 0.2 if scheme == "int4" else 0.02
    assert 0 < error.weight < limit and 0 < error.output < limit
    dense = with_dense_weights(after)
    assert "dequantize" not in {node.op for node in dense.calls()}
    torch.testing.assert_close(interpret(dense, (ids,)), interpret(after, (ids,)))


def test_a_report_says_what_it_measured():
    graph = parse(LM)
    recipe = calibrate(graph, (), resolve_config(QuantConfig("int4")))
    found = assess(graph, recipe, [i % 11 for i in range(40)], "a text", True, longest=16)
    data = found.to_json()
    assert (data["tokens"], data["length"], data["stride"]) == (39, 16, 8)
    assert data["perplexity"] != data["base_perplexity"]
    assert data["layers"][0]["name"] == "w"

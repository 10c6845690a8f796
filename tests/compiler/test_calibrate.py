"""Calibration: lockstep runs, GPTQ against its definition, AWQ, SmoothQuant, texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewriting import assert_same_numbers, parse
from tilewright.compiler.calibrate.awq import awq_vector
from tilewright.compiler.calibrate.gptq import gptq_codes
from tilewright.compiler.calibrate.grid import Grid, gram_of, loss_of, steady_gram
from tilewright.compiler.calibrate.lockstep import run_in_step
from tilewright.compiler.calibrate.recipe import calibrate, plain_graph
from tilewright.compiler.calibrate.smoothquant import (
    rounded_rows,
    smooth_scales,
    smoothquant_vector,
)
from tilewright.compiler.calibrate.text import calibration_samples, encode_text, read_text
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.compiler.lowering import lower
from tilewright.compiler.sources import open_source
from tilewright.errors import UsageError, VerificationError
from tilewright.formats import Held
from tilewright.formats.tokenizer import Tokenizer, TokenizerConfig
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.passes.driver import run_passes
from tilewright.passes.pipeline import pipeline, quantizing
from tilewright.passes.quantize import linears_to_quantize
from tilewright.passes.quantize_check import decoded
from tilewright.passes.schemes import SCHEMES, QuantConfig, resolve_config
from tilewright.passes.smooth import smooth, smooth_pass, smooth_sites
from tiny_gguf import tiny_bpe, write_tiny_gguf

GRAPH = """
def g(x: f32[S, 32]):
    norm: f32[32] = param("norm")
    h: f32[S, 32] = rms_norm(x, norm, eps=1e-06)
    up: f32[48, 32] = param("up")
    up_bias: f32[48] = param("up_bias")
    linear_0: f32[S, 48] = linear(h, up, up_bias)
    a: f32[S, 24] = slice(linear_0, dim=1, start=0, stop=24)
    b: f32[S, 24] = slice(linear_0, dim=1, start=24, stop=48)
    gated_0: f32[S, 24] = gated(a, b, activation="silu")
    down: f32[32, 24] = param("down")
    linear_1: f32[S, 32] = linear(gated_0, down)
    y: f32[S, 32] = add(x, linear_1)
    return {"y": y}
"""


def _config(scheme: str, **options: object) -> QuantConfig:
    return resolve_config(QuantConfig(scheme, **options))


def _grid(**options: object) -> Grid:
    return Grid.of(SCHEMES["int4"], _config("int4", **options))


def _rows(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, some columns much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    scale = torch.rand(width, generator=generator).mul(3).exp()
    return torch.randn(tokens, width, generator=generator) @ mix * scale


def _obq(weight, gram, scale, zero, grid, damping):
    """Optimal brain quantization column by column, by its definition: the inverse of what is left
    is made anew for each column.
    """
    weight, gram = weight.double().clone(), gram.double()
    gram = gram + torch.eye(len(gram), dtype=torch.float64) * gram.diagonal().mean() * damping
    left = gram.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.empty_like(weight)
    while left:
        inverse = torch.linalg.inv(gram[left][:, left])
        column, rest = left[0], left[1:]
        s, z = scale[:, column], zero[:, column]
        codes[:, column] = grid.encode(weight[:, column], s, z)
        error = weight[:, column] - (codes[:, column] - z) * s
        weight[:, rest] -= torch.outer(error, inverse[0, 1:] / inverse[0, 0])
        left = rest
    return codes


@pytest.mark.quick
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [40, 150])
def test_gptq_is_optimal_brain_quantization(symmetric: bool, width: int):
    grid = _grid(group=32, symmetric=symmetric)
    weight = torch.randn(6, width)
    gram = gram_of(_rows(400, width))
    codes, scale, zero, value = gptq_codes("w", weight, gram, grid)
    scales, zeros = grid.columns(scale, width), grid.columns(zero, width)
    wanted = _obq(weight, gram, scales, zeros, grid, 0.01)
    assert (codes != wanted).float().mean() < 0.02  # ties of float32 and float64
    assert torch.equal(value, (codes - zeros) * scales)
    nearest = grid.rounded(weight, scales, zeros)
    assert loss_of(value - weight, gram) < 0.8 * loss_of(nearest - weight, gram)


def test_gptq_of_columns_that_have_nothing_in_common_rounds_to_nearest():
    grid, weight = _grid(group=0), torch.randn(5, 20)
    gram = torch.diag(torch.rand(20) + 0.1)
    gram[3, 3] = 0.0  # a column that no input uses
    codes, scale, zero, _ = gptq_codes("w", weight, gram, grid)
    assert torch.equal(codes, grid.encode(weight, scale, zero))


def test_gptq_names_the_weight_whose_inputs_are_hopeless():
    with pytest.raises(VerificationError, match="layers.3"):
        gptq_codes("layers.3", torch.randn(4, 8), torch.full((8, 8), float("nan")), _grid())


def test_parts_of_a_grid_are_those_that_the_op_reads():
    for config in (_config("int4", group=32), _config("int4", group=32, symmetric=False)):
        scheme = SCHEMES["int4"]
        grid, weight = Grid.of(scheme, config), torch.randn(5, 40)
        scale, zero = grid.fit(weight, torch.eye(40))
        codes = grid.encode(weight, grid.columns(scale, 40), grid.columns(zero, 40))
        parts = grid.parts("w", codes, scale, zero)
        own = scheme.parts(Held(weight, "w"), config)
        assert {k: (p.shape, p.dtype) for k, p in parts.items()} == {
            k: (p.shape, p.dtype) for k, p in own.items()
        }


def test_a_fit_loses_no_more_than_the_whole_range():
    grid, weight = _grid(group=32), torch.randn(6, 70)
    gram = gram_of(_rows(300, 70))
    groups = grid.by_group(weight)
    plain = grid.rounded(groups, *grid.ranges(groups)).flatten(1)[:, :70]
    scale, zero = grid.fit(weight, gram)
    fitted = grid.rounded(weight, grid.columns(scale, 70), grid.columns(zero, 70))
    for start, stop in ((0, 32), (32, 64), (64, 70)):
        block = gram[start:stop, start:stop]
        losses = [loss_of((v - weight)[:, start:stop], block) for v in (fitted, plain)]
        assert losses[0] <= losses[1]


def test_a_scale_of_floats_cuts_nothing_and_cancels_in_the_direction_that_counts():
    grid, weight = Grid.of(SCHEMES["fp8"], _config("fp8")), torch.randn(16, 64)
    rows = torch.randn(300, 64) * 0.1 + torch.randn(64)  # a mean that outweighs all else
    gram = gram_of(rows)
    scale, zero = grid.fit(weight, gram)
    plain = grid.ranges(weight[:, None])[0][:, 0]
    ratio = scale / plain
    assert bool((ratio >= 1).all()) and bool((ratio < 2).all())
    nearest = weight.abs().amax(1, keepdim=True) / 448
    torch.testing.assert_close(plain, nearest)
    fitted, whole = (grid.rounded(weight, s, zero) for s in (scale, plain))
    assert loss_of(fitted - weight, gram) < 0.3 * loss_of(whole - weight, gram)


def test_few_tokens_are_not_taken_at_their_word():
    """Codes by GPTQ, judged on inputs that they were not made from."""
    grid, weight = _grid(group=0), torch.randn(24, 64)
    inputs = torch.randn(4096, 64) + torch.randn(4096, 2) @ torch.randn(2, 64) * 3
    rows, others = inputs.split((80, 4016))
    truth = gram_of(others)
    losses = [
        loss_of(gptq_codes("w", weight, gram, grid)[3] - weight, truth)
        for gram in (steady_gram(rows), gram_of(rows))
    ]
    assert losses[0] < 0.9 * losses[1]
    torch.testing.assert_close(steady_gram(rows).diagonal(), gram_of(rows).diagonal())
    many = steady_gram(others.repeat(50, 1))
    torch.testing.assert_close(many, truth, rtol=2e-2, atol=1e-2 * truth.diagonal().max().item())


def test_awq_scales_up_what_is_large_and_loses_less():
    grid, weight = _grid(group=32), torch.randn(16, 64)
    rows = torch.randn(200, 64)
    rows[:, 7] *= 50
    vector = awq_vector(rows, [weight], grid)
    assert vector[7] == vector.max()
    gram = gram_of(rows)

    def loss(scales: torch.Tensor) -> float:
        groups = grid.by_group(weight * scales)
        value = grid.rounded(groups, *grid.ranges(groups)).flatten(1) / scales
        return loss_of(value - weight, gram)

    assert loss(vector) < 0.5 * loss(torch.ones(64))


def test_smoothquant_by_hand():
    rows = torch.tensor([[4.0, -0.25, 0.0], [-1.0, 0.125, 0.0]])
    weight = torch.tensor([[1.0, 4.0, 1.0], [-0.25, 1.0, 2.0]])
    assert smooth_scales(rows, weight, 0.5).tolist() == [2.0, 0.25, 1.0]


def test_smoothquant_loses_less_where_channels_are_large():
    rows, weight = torch.randn(300, 64), torch.randn(24, 64)
    rows[:, 5] *= 100
    vector = smoothquant_vector(rows, [weight[:8], weight[8:]], DType.I8)

    def loss(scales: torch.Tensor) -> float:
        found = rounded_rows(rows / scales, DType.I8) @ rounded_rows(weight * scales, DType.I8).T
        return (found - rows @ weight.T).norm().item()

    assert vector[5] > 2 * vector.median()
    assert loss(vector) < 0.5 * loss(torch.ones(64))


@pytest.mark.quick
def test_smoothing_changes_no_result():
    graph = parse(GRAPH)
    vectors = {
        "up": Held(torch.rand(32) + 0.5, "up.smooth"),
        "down": Held(torch.rand(24) + 0.5, "down.smooth"),
    }
    sites = smooth_sites(graph, vectors)
    assert [site.divided for site in sites] == [(("norm", 0),), (("up", 24), ("up_bias", 24))]
    result = smooth(graph, vectors)
    assert str(result) == str(graph)
    assert_same_numbers(graph, result, {"S": 5}, 1e-3)
    assert not torch.allclose(result.weights["down"].load(), graph.weights["down"].load())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"y": y}', '{"y": y, "h": h, "g": gated_0}'),
        ("add(x, linear_1)", "add(h, linear_1)"),
        (
            "stop=24)\n    b",
            "stop=25)\n    c: f32[S, 24] = slice(a, dim=1, start=0, stop=24)\n    b",
        ),
    ],
    ids=["outputs", "another reader", "columns that overlap"],
)
def test_what_others_read_is_not_smoothed(old: str, new: str):
    text = GRAPH.replace(old, new)
    if "start=0, stop=25" in text:
        text = text.replace("a: f32[S, 24]", "a: f32[S, 25]").replace("gated(a, b", "gated(c, b")
    sites = smooth_sites(parse(text), ("up", "down"))
    assert len(sites) == (0 if "out" in new or '"h"' in new else 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A captured two-layer llama, four heads over two of keys and values."""
    path = tmp_path_factory.mktemp("llama") / "llama.gguf"
    write_tiny_gguf(path)
    source = open_source(path)
    return lower(capture_causal_lm(source.module), "llama", source.weights)


def test_each_input_of_a_llama_is_a_site_in_every_form(llama: Graph):
    config, found = _config("int8"), []
    for cache in (None, "paged", "slot"):
        graph, _ = run_passes(llama, pipeline(cache))
        names = list(linears_to_quantize(graph, config))
        found.append([(s.names, s.divided, s.heads) for s in smooth_sites(graph, names)])
    assert found[0] == found[1] == found[2]
    attention = [(divided, heads) for names, divided, heads in found[0] if "o_proj" in names[0]]
    assert len(found[0]) == 8 and len(attention) == 2
    (((name, start),), heads) = attention[0]
    assert "v_proj" in name and (start, heads) == (96, (2, 2, 16))


def test_a_smoothed_llama_is_the_same(llama: Graph):
    graph = plain_graph(llama)
    generator = torch.Generator().manual_seed(1)
    sites = smooth_sites(graph, list(linears_to_quantize(graph, _config("int8"))))
    vectors = {}
    for site in sites:
        count, _, width = site.heads
        drawn = torch.rand(count * width, generator=generator) + 0.5
        vectors[site.names[0]] = Held(drawn, f"{site.names[0]}.smooth")
    ids = (torch.arange(9)[None],)
    (wanted,), (found,) = interpret(graph, ids), interpret(smooth(graph, vectors), ids)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_lockstep_sees_what_the_interpreter_does():
    graph = parse(GRAPH)
    samples = [(torch.randn(n, 32),) for n in (3, 5)]
    wanted: dict[str, list[torch.Tensor]] = {"up": [], "down": []}

    def watch(node, value):
        if node.op == "linear":
            name = str(node.operands[1].attr("name"))
            wanted[name].append(seen[node.operands[0]])
        seen[node] = value

    for inputs in samples:
        seen: dict[object, torch.Tensor] = {}
        interpret(graph, inputs, watch=watch)
    found = {}
    run_in_step(
        graph, samples, ["up", "down"], lambda name, rows, weight: found.update({name: rows})
    )
    for name, rows in found.items():
        assert torch.equal(rows, torch.cat(wanted[name]))


def test_lockstep_goes_on_with_the_new_weight():
    graph, rows = parse(GRAPH), {}

    def observe(name, found, weight):
        rows[name] = found
        return torch.zeros_like(weight)

    run_in_step(graph, [(torch.randn(3, 32),)], ["up", "down"], observe)
    bias = graph.weights["up_bias"].load()
    wanted = torch.nn.functional.silu(bias[:24]) * bias[24:]
    torch.testing.assert_close(rows["down"], wanted.expand(3, -1))


def test_activations_that_are_not_finite_name_their_weight():
    with pytest.raises(VerificationError, match="'up'"):
        run_in_step(parse(GRAPH), [(torch.full((2, 32), float("nan")),)], ["up"], lambda *a: None)


@pytest.mark.parametrize(
    ("scheme", "method"), [("int4", "gptq"), ("int4", "awq"), ("int8", "smoothquant")]
)
def test_weights_that_are_not_finite_are_named(scheme: str, method: str):
    graph = parse(GRAPH)
    broken = graph.weights["down"].load().clone()
    broken[3, 4] = float("inf")
    graph = graph.with_weights({"down": Held(broken, "down")})
    with pytest.raises(VerificationError, match="the weight 'down'"):
        calibrate(graph, [(_rows(40, 32),)], _config(scheme, method=method))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_groups_of_zeros_stay_zeros(method: str, symmetric: bool):
    graph = parse(GRAPH)
    holed = graph.weights["up"].load().clone()
    holed[5], holed[:, :16] = 0.0, 0.0
    graph = graph.with_weights({"up": Held(holed, "up")})
    config = _config("int4", group=0, method=method, symmetric=symmetric)
    recipe = calibrate(graph, [(_rows(64, 32),)], config)
    node = linears_to_quantize(graph, config)["up"][0]
    value = decoded(recipe.parts_of("up", graph.weights["up"]), node, recipe)
    assert bool(torch.isfinite(value).all()) and not value[5].any()


@pytest.mark.quick
@pytest.mark.parametrize(
    "config",
    [
        ("int4", {"group": 32, "method": "gptq"}),
        ("int4", {"group": 32, "method": "awq", "symmetric": False}),
        ("int8-weight", {"method": "gptq"}),
        ("int8-weight", {"group": 32, "method": "gptq"}),
        ("int8", {}),
        ("fp8", {"method": "gptq"}),
        ("fp8-tensor", {}),
    ],
    ids=str,
)
def test_recipes_pass_the_driver(config):
    graph = parse(GRAPH)
    x = _rows(64, 32)
    recipe = calibrate(graph, [(x[:40],), (x[40:],)], _config(config[0], **config[1]))
    result, records = run_passes(graph, quantizing(recipe), level="full", samples=(x[:7],))
    assert max(record.max_error for record in records) < 1e-4
    (wanted,), (found,) = interpret(graph, (x,)), interpret(result, (x,))
    assert (wanted - found).norm() < 0.1 * wanted.norm()


def test_calibrated_codes_lose_less_than_the_nearest():
    graph = parse(GRAPH)
    x = _rows(300, 32)
    losses = {}
    for method in ("rtn", "gptq", "awq"):
        recipe = calibrate(graph, [(x,)], _config("int4", group=32, method=method))
        result, _ = run_passes(graph, quantizing(recipe))
        losses[method] = (interpret(graph, (x,))[0] - interpret(result, (x,))[0]).norm()
    assert max(losses["gptq"], losses["awq"]) < losses["rtn"]


def test_vectors_of_a_calibration_are_exact():
    graph = parse(GRAPH)
    recipe = calibrate(graph, [(_rows(64, 32),)], _config("int8"))
    assert set(recipe.smooth) == {"up", "down"}
    _, (record,) = run_passes(
        graph, [smooth_pass(recipe.smooth)], level="full", samples=(_rows(5, 32, 1),)
    )
    assert record.max_error < 1e-5


def _tokenizer() -> Tokenizer:
    return Tokenizer(tiny_bpe(), TokenizerConfig())


def test_samples_are_seeded_and_apart():
    tokenizer = _tokenizer()
    config = _config("int4", method="gptq", tokens=1024)
    samples = calibration_samples(tokenizer, config)
    again = calibration_samples(tokenizer, config)
    other = calibration_samples(tokenizer, _config("int4", method="gptq", tokens=1024, seed=1))
    assert [tuple(s.shape) for s in samples] == [(1, 512)] * 2
    assert all(torch.equal(a, b) for a, b in zip(samples, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(samples, other, strict=True))
    assert [s.shape[1] for s in calibration_samples(tokenizer, config, 64)] == [64] * 16


def test_texts_that_will_not_do_are_refused(tmp_path: Path):
    tokenizer = _tokenizer()
    short = tmp_path / "short.txt"
    short.write_text("the quick brown fox")
    with pytest.raises(UsageError, match="at least 1024 tokens"):
        encode_text(tokenizer, short)
    with pytest.raises(UsageError, match=r"nowhere\.txt"):
        read_text(tmp_path / "nowhere.txt")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        read_text(binary)
    assert len(encode_text(tokenizer, None)) > 4096

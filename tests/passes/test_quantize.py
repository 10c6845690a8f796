"""Schemes and the pass: what is quantized, what the numbers are, and that requests stay apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rewriting import draw_inputs, parse
from tilewright.errors import GraphError, UnsupportedError, UsageError, VerificationError
from tilewright.formats import Held, apply_weight
from tilewright.ir.build import const, make
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph, param_name
from tilewright.ir.interpreter import interpret
from tilewright.ir.ops.control import body_of
from tilewright.ir.verifier import verify
from tilewright.passes.driver import run_passes
from tilewright.passes.fuse import fuse
from tilewright.passes.fuse_linears import fuse_linears
from tilewright.passes.quantize import (
    Recipe,
    check_skips,
    head_products,
    linears_to_quantize,
    quantize_pass,
)
from tilewright.passes.schemes import SCHEMES, Linear, QuantConfig, Scheme, resolve_config
from tilewright.targets import Target

LAYER = """
def g(token_ids: i64[T], query_start: i32[B + 1], logits_indices: i64[R]):
    table: f32[50, 36] = param("embed.weight")
    x: f32[T, 36] = embedding(table, token_ids)
    norm: f32[36] = param("norm.weight")
    h: f32[T, 36] = rms_norm(x, norm, eps=1e-06)
    up: f32[48, 36] = param("up.weight")
    linear_0: f32[T, 48] = linear(h, up)
    a: f32[T, 24] = slice(linear_0, dim=1, start=0, stop=24)
    b: f32[T, 24] = slice(linear_0, dim=1, start=24, stop=48)
    gated_0: f32[T, 24] = gated(a, b, activation="silu")
    down: f32[36, 24] = param("down.weight")
    bias: f32[36] = param("down.bias")
    linear_1: f32[T, 36] = linear(gated_0, down, bias)
    y: f32[T, 36] = add(x, linear_1)
    picked: f32[R, 36] = embedding(y, logits_indices)
    logits: f32[R, 50] = linear(picked, table)
    return {"logits": logits}
"""
SIZES = {"T": 5, "B": 2, "R": 2}


def _recipe(scheme: str, **options: object) -> Recipe:
    config = resolve_config(QuantConfig(scheme, **{"method": "rtn", **options}))
    names = ("up.weight", "down.weight")
    static = {n: Held(torch.tensor([0.5]), f"{n}.input_scale") for n in names}
    return Recipe(config, static=static)


def _samples(graph: Graph) -> list[torch.Tensor]:
    ids, _, wanted = draw_inputs(graph, SIZES, torch.Generator().manual_seed(3))
    return [ids, torch.tensor([0, 2, 5], dtype=torch.int32), wanted % 5]


CONFIGS = [
    *({"scheme": name} for name in ("int8-weight", "int8", "fp8", "fp8-tensor", "fp8-weight")),
    {"scheme": "fp8-block"},
    {"scheme": "int8-weight", "group": 32},
    *({"scheme": "int4", "group": g, "symmetric": s} for g in (0, 32) for s in (True, False)),
]


@pytest.mark.quick
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_driver_finds_each_scheme_right(config):
    graph = parse(LAYER)
    result, (record,) = run_passes(
        graph, [quantize_pass(_recipe(**config))], level="full", samples=_samples(graph)
    )
    assert record.max_error < 1e-5
    verify(result)
    ops = {node.op for node in result.calls()}
    quantizes = SCHEMES[config["scheme"]].activations != "none"
    assert ops & {"dequantize", "scaled_linear"} == {"scaled_linear" if quantizes else "dequantize"}
    assert "up.weight" not in result.weights and "embed.weight" in result.weights
    # The truth is not far: rounding costs some percent, codes in a wrong place cost everything.
    inputs = _samples(graph)
    (before,), (after,) = interpret(graph, inputs), interpret(result, inputs)
    assert (before - after).norm() < 0.2 * before.norm()


@pytest.mark.quick
def test_golden():
    graph = parse("""
def g(x: f32[S, 8]):
    w: f32[4, 8] = param("w")
    linear_0: f32[S, 4] = linear(x, w)
    return {"y": linear_0}
""")
    (pass_,) = [quantize_pass(_recipe("int8"))]
    assert str(pass_.run(graph)) == str(
        parse("""
def g(x: f32[S, 8]):
    quantize_rows_0: (i8[S, 8], f32[S, 1],) = quantize_rows(x, dtype=i8, group=0)
    item_0: i8[S, 8] = item(quantize_rows_0, index=0)
    item_1: f32[S, 1] = item(quantize_rows_0, index=1)
    w_codes: i8[4, 8] = param("w.codes")
    w_scale: f32[4, 1] = param("w.scale")
    y: f32[S, 4] = scaled_linear(item_0, item_1, w_codes, w_scale, dtype=f32, group=0, rows=1)
    return {"y": y}
""")
    )


def test_what_is_chosen():
    graph = parse(LAYER)
    assert list(linears_to_quantize(graph, QuantConfig("int4"))) == ["up.weight", "down.weight"]
    assert [param_name(n.operands[1]) for n in head_products(graph)] == ["embed.weight"]
    config = QuantConfig("int4", skip=("down*",), lm_head=True)
    assert list(linears_to_quantize(graph, config)) == ["up.weight", "embed.weight"]
    with pytest.raises(UsageError, match=r"layers\.9"):
        check_skips(graph, QuantConfig("int4", skip=("down*", "layers.9.*")))


ROUTED = """
def g(x: f32[S, 8]):
    w: f32[8, 8] = param("w")
    h: f32[S, 8] = linear(x, w)
    router: f32[4, 8] = param("router")
    scores: f32[S, 4] = linear(h, router)
    soft: f32[S, 4] = softmax(scores, dim=1)
    best: (f32[S, 2], i64[S, 2],) = topk(soft, k=2, dim=1)
    weights: f32[S, 2] = item(best, index=0)
    ids: i64[S, 2] = item(best, index=1)
    up: f32[4, 12, 8] = param("up")
    down: f32[4, 8, 6] = param("down")
    y: f32[S, 8] = moe_experts(h, ids, weights, up, down, activation="silu")
    return {"y": y}
"""


def test_routers_stay():
    assert list(linears_to_quantize(parse(ROUTED), QuantConfig("int4", lm_head=True))) == ["w"]


def test_a_tied_head_is_quantized_and_its_embedding_is_not():
    graph = parse(LAYER)
    result = quantize_pass(_recipe("int8-weight", lm_head=True)).run(graph)
    embedding = next(node for node in result.nodes if node.op == "embedding")
    assert embedding.operands[0].op == "param"
    assert {"embed.weight", "embed.weight.codes"} <= set(result.weights)


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_fusion_leaves_quantized_products_as_they_are(scheme: str):
    quantized = quantize_pass(_recipe(scheme)).run(parse(LAYER))
    op = "linear" if scheme == "int4" else "scaled_linear"
    fused = verify(fuse(quantized))
    weights = [n for n in fused.nodes if n.op == op and "embed" not in str(n.operands[1].attrs)]
    assert len([n for n in weights if n.operands[1].op != "param" or op != "linear"]) == 2
    same_numbers(quantized, fused)


@pytest.mark.parametrize(("scheme", "op"), [("int4", "dequantize"), ("int8", "quantize_rows")])
def test_decode_products_take_in_what_makes_their_operands(scheme: str, op: str):
    quantized = quantize_pass(_recipe(scheme)).run(parse(LAYER))
    fused = verify(fuse_linears(quantized))
    bodies = [body_of(n) for n in fused.nodes if n.op == "fused"]
    assert [sum(n.op == op for n in body.nodes) for body in bodies].count(1) == 2
    same_numbers(quantized, fused)


def same_numbers(one: Graph, other: Graph) -> None:
    inputs = _samples(one)
    for a, b in zip(interpret(one, inputs), interpret(other, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("int5", "int8-weight, int8, fp8, fp8-tensor"),
        (QuantConfig("int4", group=48), "128, 64, 32, 0"),
        (QuantConfig("fp8", method="awq"), "rtn, gptq, smoothquant"),
        (QuantConfig("int8", symmetric=False), "True"),
        (QuantConfig("int4", skip="*.q"), "a tuple of patterns"),
        (QuantConfig("int4", tokens=0), "a positive integer"),
        (QuantConfig("int4", compute="int4"), "float, int8"),
        (QuantConfig("fp8", compute="int8"), "float"),
        (7, "int8-weight"),
    ],
)
def test_wrong_options_list_the_valid_ones(config, expected: str):
    with pytest.raises(UsageError, match=expected):
        resolve_config(config)


def test_a_target_without_fp8_says_what_it_has():
    with pytest.raises(UnsupportedError, match="fp8-weight, int4"):
        resolve_config("fp8", Target.parse("a100"))
    assert resolve_config("fp8", Target.parse("h100")).method == "rtn"
    assert resolve_config("int8", Target.parse("a100")).group == 0


def test_a_static_scheme_wants_calibrated_scales():
    recipe = replace(_recipe("fp8-tensor"), static={})
    with pytest.raises(UsageError, match=r"up\.weight"):
        quantize_pass(recipe).run(parse(LAYER))


class Halves(Scheme):
    """A toy: weights as bfloat16."""

    name = "halves"
    codes = DType.BF16

    def parts(self, weight, config):
        return {"codes": apply_weight("cast", (weight,), dtype=torch.bfloat16)}

    def value(self, parts, linear, config):
        return make("cast", parts["codes"], dtype=linear.dtype)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-block"])
def test_sixteen_bits_are_checked_in_float32(scheme: str, dtype: str):
    """In their own type one last bit moves a code of eight by a sixteenth, and more behind it."""
    graph = parse(LAYER.replace("f32", dtype))
    _, (record,) = run_passes(
        graph, [quantize_pass(_recipe(scheme))], level="full", samples=_samples(graph)
    )
    assert record.max_error < 1e-4


class Stretched(type(SCHEMES["fp8"])):
    """A toy whose products are 3% too large."""

    name = "stretched"

    def product(self, parts, linear, config):
        found = super().product(parts, linear, config)
        return make("mul", found, const(1.03, found.dtype))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_product_that_is_a_little_off_is_refused(monkeypatch, dtype: str):
    monkeypatch.setitem(SCHEMES, "stretched", Stretched())
    graph = parse(LAYER.replace("f32", dtype))
    with pytest.raises(VerificationError, match="pass quantize"):
        run_passes(
            graph, [quantize_pass(_recipe("stretched"))], level="full", samples=_samples(graph)
        )


def test_a_scheme_is_one_file(monkeypatch):
    monkeypatch.setitem(SCHEMES, "halves", Halves())
    graph = parse(LAYER)
    result, (record,) = run_passes(
        graph, [quantize_pass(_recipe("halves"))], level="full", samples=_samples(graph)
    )
    assert record.max_error < 1e-6
    assert result.weights["up.weight.codes"].dtype == torch.bfloat16


class Mixing(Halves):
    """A toy whose scale of activations is made of all tokens at once."""

    name = "mixing"
    activations = "token"

    def product(self, parts, linear: Linear, config):
        most = make("amax", make("abs", linear.x), dims=(0, 1), keepdim=True)
        return make("linear", make("div", linear.x, most), self.value(parts, linear, config))


def test_scales_of_several_requests_are_refused(monkeypatch):
    monkeypatch.setitem(SCHEMES, "mixing", Mixing())
    with pytest.raises(UnsupportedError, match="amax.*token"):
        quantize_pass(_recipe("mixing")).run(parse(LAYER))


class Swapped(Halves):
    """A toy that takes one row of a weight for another."""

    name = "swapped"

    def parts(self, weight, config):
        half = weight.shape[0] // 2
        cut = ((half, 2 * half), (0, half))
        rows = [apply_weight("slice", (weight,), dim=0, start=a, stop=b) for a, b in cut]
        return super().parts(apply_weight("concat", tuple(rows), dim=0), config)


def test_codes_in_a_wrong_place_are_found(monkeypatch):
    monkeypatch.setitem(SCHEMES, "swapped", Swapped())
    graph = parse(LAYER)
    with pytest.raises(VerificationError, match=r"up\.weight"):
        run_passes(
            graph, [quantize_pass(_recipe("swapped"))], level="full", samples=_samples(graph)
        )


def test_replace_param():
    graph = parse(LAYER)
    half = {"half": apply_weight("mul", (graph.weights["down.weight"], 0.5))}

    def twice(parts):
        return make("mul", parts["half"], const(2.0, DType.F32))

    result = verify(graph.replace_param("down.weight", half, twice))
    assert set(result.weights) == set(graph.weights) - {"down.weight"} | {"down.weight.half"}
    inputs = _samples(graph)
    assert torch.equal(interpret(graph, inputs)[0], interpret(result, inputs)[0])
    for name, parts, expr in (
        ("nothing", half, twice),
        ("down.weight", half, lambda parts: const(1.0, DType.F32)),
        ("down", {"bias": half["half"]}, twice),
    ):
        with pytest.raises(GraphError):
            graph.replace_param(name, parts, expr)

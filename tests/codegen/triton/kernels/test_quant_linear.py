"""Decode products over codes in Triton against float64 of the dequantized weight: every scheme and
form; what they compile to; and what stands in for them where no kernel takes a product.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import tilewright as tw
from linear_forms import Form, assert_close, node_of
from quant_forms import QuantForm, quant_forms, quant_node, quant_operands, quantized_of
from rewriting import parse
from tilewright.codegen.triton.backend import OwnBytes
from tilewright.codegen.triton.kernels.linear import emit_linear
from tilewright.codegen.triton.kernels.linear_tiles import Cutting, GemmTiles, GemvTiles
from tilewright.codegen.triton.kernels.quant_linear import (
    emit_invariant_quant_linear,
    emit_quant_linear,
    quant_linear_source,
)
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.lowering import lower_graph
from tilewright.codegen.triton.package import KernelPackage
from tilewright.compiler.inspect.call_nodes import owners_of_calls
from tilewright.ir.dtypes import DType
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.passes.fuse_linears import fuse_linears
from tilewright.runtime.runner import ProgramRunner
from tilewright.targets import TARGETS
from tiny_models import PROMPTS, tiny_model
from triton_running import compile_for, run_interpreted

H100 = TARGETS["h100"]
# Shrinking interpreted kernels takes minutes, and the first failure says enough.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
SMALL_GEMV, SMALL_GEMM = GemvTiles(2, 32, 1), GemmTiles(16, 16, 16, 2, 2)


def check(
    form: QuantForm, tokens: int, gemv: GemvTiles | None, gemms: list[GemmTiles], seed: int = 0
) -> None:
    """Holds the kernel's result against float64."""
    source = quant_linear_source(quantized_of(form), H100, gemv, gemms)
    assert source is not None
    bases, wanted = quant_operands(form, tokens, seed)
    (found,) = run_interpreted(source, quant_node(form), bases, {"B": tokens})
    assert_close(form.form, found, wanted)


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(form=quant_forms(), block_n=st.sampled_from([1, 2, 8]), block_k=st.sampled_from([16, 128]))
def test_one_token(form: QuantForm, block_n: int, block_k: int) -> None:
    check(form, 1, GemvTiles(block_n, block_k, 1), [SMALL_GEMM])


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(
    form=quant_forms(),
    tokens=st.integers(1, 40),
    block_n=st.sampled_from([2, 16]),
    block_k=st.sampled_from([16, 64]),
    splits=st.integers(1, 3),
)
def test_several_tokens(
    form: QuantForm, tokens: int, block_n: int, block_k: int, splits: int
) -> None:
    tiles = GemmTiles(16, block_n, block_k, 1, 2, splits, ahead=64)
    if not tiles.has_work(form.form.k):
        tiles = replace(tiles, splits=1)
    check(form, tokens, None, [tiles])


SCHEMES = {
    "int4": QuantForm(Form(96, 24, DType.BF16), DType.U8, 32, scale=DType.BF16),
    "int4 zero": QuantForm(Form(100, 24, DType.BF16), DType.U8, 32, scale=DType.BF16,
                           zero=DType.U8),
    "int4 row": QuantForm(Form(100, 24, DType.BF16), DType.U8, 0),
    "int8": QuantForm(Form(100, 24, DType.BF16), DType.I8, 0),
    "fp8": QuantForm(Form(100, 24, DType.BF16), DType.F8E4M3, 0),
    "fp8 block": QuantForm(Form(200, 24, DType.BF16), DType.F8E4M3, 128, rows=16),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", SCHEMES)
def test_the_first_tiles_that_hold_all_tokens_are_taken(name: str) -> None:
    form = SCHEMES[name]
    form = replace(form, form=replace(form.form, norm="weight", halves=True))
    gemms = [SMALL_GEMM, replace(SMALL_GEMM, block_m=32, block_k=32, splits=2)]
    for tokens in (1, 2, 17):
        check(form, tokens, SMALL_GEMV, gemms)


def test_one_token_is_not_rounded_on_the_way() -> None:
    # 0.1 has no end in any of the types; the sum has to be that of its codes, times it.
    form = QuantForm(Form(512, 4, DType.F32), DType.I8, 0)
    source = quant_linear_source(quantized_of(form), H100, SMALL_GEMV, [])
    assert source is not None
    x = torch.ones(1, 512)
    codes = torch.randint(-127, 128, (4, 512)).to(torch.int8)
    scale = torch.full((4, 1), 0.1)
    (found,) = run_interpreted(source, quant_node(form), [x, codes, scale], {"B": 1})
    assert torch.equal(found[0], codes.sum(1).float() * 0.1)


def emitted(form: QuantForm, arch: str = "h100", most: int | None = None):
    node = quant_node(form)
    return emit_quant_linear(node, layouts(node), TARGETS[arch], Cutting(most))


def layouts(node: Node):
    return tuple(located(operand)[1] for operand in node.operands)


def test_other_nodes_are_declined() -> None:
    plain = node_of(Form())
    assert emit_quant_linear(plain, layouts(plain), H100) is None
    node = quant_node(QuantForm())
    assert emit_linear(node, layouts(node), H100) is None
    assert emit_quant_linear(node, (layouts(node)[0], None, *layouts(node)[2:]), H100) is None
    assert emit_quant_linear(node, layouts(node), H100) is not None
    assert emit_invariant_quant_linear(node, layouts(node), H100) is not None
    assert emitted(QuantForm(Form(dtype=DType.F64))) is None


def test_codes_that_a_target_has_no_type_for_are_declined() -> None:
    assert emitted(QuantForm(codes=DType.F8E4M3), "a100") is None
    assert emitted(QuantForm(codes=DType.F8E4M3), "l4") is not None
    assert emitted(QuantForm(codes=DType.I8), "a100") is not None


GATE_UP = Form(4096, 14336, DType.BF16, "weight", halves=True)  # of Llama-3-8B
DOWN = Form(14336, 4096, DType.BF16, behind=("residual",))


@pytest.mark.parametrize(
    ("name", "form", "group", "most"),
    [
        pytest.param("int4", GATE_UP, 128, 64, id="int4"),
        pytest.param("int8", DOWN, 0, 16, id="int8", marks=pytest.mark.nightly),
        pytest.param("fp8", GATE_UP, 0, 16, id="fp8", marks=pytest.mark.nightly),
    ],
)
def test_defaults_compile_ahead_of_time_and_do_not_spill(
    name: str, form: Form, group: int, most: int
) -> None:
    source = emitted(replace(SCHEMES[name], form=form, group=group), most=most)
    assert source is not None
    found = compile_for(source, H100.arch)
    assert all(one.shared <= H100.shared_memory_per_block for one in found)
    assert [one.spills for one in found] == [0] * len(found)


LAYER = """
def g(x: f32[B, 32]):
    w: f32[32] = param("w")
    codes: f8e4m3[48, 32] = param("codes")
    scale: f32[48, 1] = param("scale")
    up: f32[48, 32] = dequantize(codes, scale, dtype=f32)
    bias: f32[48] = param("bias")
    n: f32[B, 32] = rms_norm(x, w, eps=1e-06)
    u: f32[B, 48] = linear(n, up, bias)
    a: f32[B, 24] = slice(u, dim=1, start=0, step=1, stop=24)
    b: f32[B, 24] = slice(u, dim=1, start=24, step=1, stop=48)
    g: f32[B, 24] = gated(a, b, activation="silu")
    return {"g": g}
"""


@pytest.mark.parametrize(
    ("target", "kinds"),
    [("h100", ["template"]), ("a100", ["eager", "generated", "library", "generated"])],
)
def test_what_no_kernel_takes_is_calls_by_themselves(target: str, kinds: list[str]) -> None:
    before = parse(LAYER)
    graph = fuse_linears(before)
    program, sources, notes = lower_graph(graph, TARGETS[target])
    assert [call.kind for call in program.calls] == kinds
    assert [note.split(":")[0] for note in notes] == ["dequantize"] * ("eager" in kinds)
    files = {k: OwnBytes(v) for s in sources for k, v in KernelPackage(s, {}).files().items()}
    weights = {name: weight.load() for name, weight in before.weights.items()}
    runner = ProgramRunner(program, weights, files.__getitem__)
    x = torch.randn(5, 32)
    wanted = interpret(before, [x])[0]
    torch.testing.assert_close(runner.run({"x": x})["g"], wanted, rtol=1e-5, atol=1e-5)
    owners = owners_of_calls(graph, program)
    assert [owner for (owner,) in owners] == [graph.outputs[0]] * len(kinds)


def test_a_deterministic_product_has_one_cut() -> None:
    graph = fuse_linears(parse(LAYER))
    program, (source,), notes = lower_graph(graph, H100, deterministic=True)
    assert [call.kind for call in program.calls] == ["template"] and not notes
    assert len(source.variants) == 1


def test_decode_steps_of_a_quantized_model_read_its_codes() -> None:
    model, config = tiny_model("llama"), tw.QuantConfig("int4", group=32)
    options = {"target": "cpu", "max_model_len": 64, "verify": "off", "quantize": config}
    engine = tw.compile(model, backend="triton", **options)
    decode = engine.image.decode
    assert decode is not None
    products = [call for call in decode.program.calls if "linear" in call.origin]
    assert {call.kind for call in products} == {"template"}
    assert sum("dequantize" in call.origin for call in products) == len(products) - 1 == 8
    params = tw.SamplingParams(max_new_tokens=2, ignore_eos=True)
    ours = engine.generate(PROMPTS[:1], params)
    eager = tw.compile(model, backend="eager", **options).generate(PROMPTS[:1], params)
    assert [c.token_ids for c in ours] == [c.token_ids for c in eager]

"""Stepwise references are Hugging Face's formulas in 16 bits, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tilewright.errors import GraphError
from tilewright.ir.build import input_node, make
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType

pytestmark = pytest.mark.quick

HALVES = [torch.bfloat16, torch.float16]
TOKENS, WIDTH = 40, 64
norm, rope, gated, append = (
    schema(op).reference for op in ("rms_norm", "rope", "gated", "append_kv")
)


def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def angles(dtype: torch.dtype, half: int = WIDTH // 2) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(TOKENS)[:, None] * 10000.0 ** -(torch.arange(half) / half)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def weighted(kind: type[torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    module = kind(WIDTH, eps=1e-5)
    torch.nn.init.normal_(module.weight)
    return module.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", HALVES)
def test_rms_norm_is_llamas(dtype: torch.dtype) -> None:
    module, x = weighted(LlamaRMSNorm, dtype), draw(dtype, TOKENS, WIDTH)
    wanted = module(x)
    assert torch.equal(norm(x, module.weight, eps=1e-5, stepwise=True), wanted)
    assert not torch.equal(norm(x, module.weight, eps=1e-5), wanted)  # the attribute matters


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rope_is_that_of_the_models(dtype: torch.dtype, layout: str) -> None:
    q, (cos, sin) = draw(dtype, 1, 4, TOKENS, WIDTH), angles(dtype)
    if layout == "half":
        wanted, _ = apply_rotary_pos_emb(q, q, *(torch.cat([t, t], -1)[None] for t in (cos, sin)))
    else:
        # Cohere's function turns in float32; here its formula is in the type of its operands.
        full_cos, full_sin = (table.repeat_interleave(2, -1) for table in (cos, sin))
        wanted = q * full_cos + modeling_cohere.rotate_half(q) * full_sin
    assert torch.equal(rope(q, cos, sin, layout=layout, stepwise=True), wanted)
    assert not torch.equal(rope(q, cos, sin, layout=layout), wanted)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("activation", "name"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")]
)
def test_gated_is_the_product_in_llamas_mlp(dtype: torch.dtype, activation: str, name: str) -> None:
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=96, hidden_act=activation)
    mlp, x = LlamaMLP(config).to(dtype), draw(dtype, TOKENS, WIDTH)
    products: list[torch.Tensor] = []
    mlp.down_proj.register_forward_pre_hook(lambda module, args: products.append(args[0]))
    with torch.no_grad():
        mlp(x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    assert torch.equal(gated(gate, up, activation=name, stepwise=True), products[0])
    assert not torch.equal(gated(gate, up, activation=name), products[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_append_kv_is_qwen3s(dtype: torch.dtype) -> None:
    k, q = draw(dtype, TOKENS, 2, WIDTH), draw(dtype, TOKENS, 4, WIDTH)
    norms = [weighted(Qwen3RMSNorm, dtype) for _ in range(2)]
    tables = angles(dtype)
    full = [torch.cat([t, t], -1)[None] for t in tables]
    heads = (each(x).transpose(0, 1)[None] for each, x in zip(norms, (q, k), strict=True))
    q_wanted, k_wanted = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*heads, *full))
    cache = k.new_zeros(1, TOKENS, 2, WIDTH)
    weights = [each.weight for each in norms]
    slots = torch.arange(TOKENS)
    found = append(k, k, cache, cache, slots, q, *tables, *weights, eps=1e-5, stepwise=True)
    assert torch.equal(found[0][0], k_wanted)
    assert torch.equal(found[2], q_wanted)


def test_in_float32_it_changes_nothing() -> None:
    x, weight = draw(torch.float32, TOKENS, WIDTH), draw(torch.float32, WIDTH)
    cos, sin = angles(torch.float32)
    for found, wanted in (
        (norm(x, weight, eps=1e-5, stepwise=True), norm(x, weight, eps=1e-5)),
        (rope(x, cos, sin, stepwise=True), rope(x, cos, sin)),
        (gated(x, -x, activation="silu", stepwise=True), gated(x, -x, activation="silu")),
    ):
        assert torch.equal(found, wanted)


def node(name: str, dtype: DType, *shape: int) -> Node:
    return input_node(name, TensorType(dtype, shape))


X, WIDE = node("x", DType.BF16, 3, 2, 8), node("w", DType.F32, 8)
TABLE = node("c", DType.F32, 3, 1, 4)
CACHE, SLOTS = node("cache", DType.BF16, 2, 4, 2, 8), node("slots", DType.I64, 3)
BYTES = node("b", DType.F8E4M3, 3, 8)


@pytest.mark.parametrize(
    ("op", "args", "attrs"),
    [
        ("rms_norm", (X, WIDE), {"eps": 1e-5, "stepwise": True}),
        ("rms_norm", (X,), {"eps": 1e-5, "stepwise": True}),
        ("rope", (X, TABLE, TABLE), {"stepwise": True}),
        ("gated", (BYTES, BYTES), {"activation": "silu", "stepwise": True}),
        ("gated", (X, X), {"activation": "silu", "stepwise": False}),
        ("append_kv", (X, X, CACHE, CACHE, SLOTS), {"stepwise": True}),
        (
            "append_kv",
            (X, X, CACHE, CACHE, SLOTS, None, None, None, None, WIDE),
            {"eps": 1e-5, "stepwise": True},
        ),
    ],
    ids=["weight of f32", "no weight", "tables of f32", "8 bits", "False", "no step", "k weight"],
)
def test_what_has_no_steps_in_one_type_is_ill_typed(op, args, attrs) -> None:
    with pytest.raises(GraphError, match="stepwise"):
        make(op, *args, **attrs)

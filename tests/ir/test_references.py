"""References of rope, norms and experts against Hugging Face and torch."""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tilewright.ir.schema import schema

pytestmark = pytest.mark.quick

rope = schema("rope").reference
experts = schema("moe_experts").reference


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def angles(tokens, half):
    theta = torch.arange(tokens)[:, None] * 10000.0 ** -(torch.arange(half).double() / half)
    return theta.cos(), theta.sin()


def test_rope_half_is_llamas():
    q, k = draw(1, 4, 5, 8), draw(1, 2, 5, 8)
    cos, sin = angles(5, 4)
    full = (torch.cat([x, x], -1)[None] for x in (cos, sin))
    for x, wanted in zip((q, k), modeling_llama.apply_rotary_pos_emb(q, k, *full), strict=True):
        torch.testing.assert_close(rope(x, cos, sin, layout="half"), wanted)


def test_rope_interleaved_is_coheres():
    q = draw(1, 4, 5, 8)
    cos, sin = angles(5, 4)
    full = (x.repeat_interleave(2, -1)[None] for x in (cos, sin))
    wanted, _ = modeling_cohere.apply_rotary_pos_emb(q, q, *full)
    found = rope(q, cos, sin, layout="interleaved")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_partial_interleaved_rope_is_gptjs():
    x = draw(1, 5, 4, 8)  # [B, S, H, D]
    cos, sin = angles(5, 3)
    turned = modeling_gptj.apply_rotary_pos_emb(x[..., :6], sin[None], cos[None])
    found = rope(x, cos[:, None], sin[:, None], layout="interleaved")
    torch.testing.assert_close(found, torch.cat([turned, x[..., 6:]], -1))


def test_partial_half_rope_leaves_the_rest():
    x = draw(5, 4, 8)
    cos, sin = angles(5, 2)
    found = rope(x, cos[:, None], sin[:, None], layout="half")
    torch.testing.assert_close(found[..., :4], rope(x[..., :4], cos[:, None], sin[:, None]))
    assert torch.equal(found[..., 4:], x[..., 4:])


def test_rope_keeps_the_element_type():
    cos, sin = (x.float() for x in angles(5, 4))
    assert rope(draw(4, 5, 8).bfloat16(), cos, sin).dtype is torch.bfloat16


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_is_torchs(weighted):
    x, weight = draw(3, 8), draw(8) if weighted else None
    found = schema("rms_norm").reference(x, weight, eps=1e-5)
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(x, (8,), weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_takes_weights_of_another_type(dtype):
    x, weight, bias = draw(3, 8).to(dtype), draw(8).float(), draw(8).bfloat16()
    found = schema("layer_norm").reference(x, weight, bias, eps=1e-5)
    wanted = torch.nn.functional.layer_norm(x.double(), (8,), weight.double(), bias.double(), 1e-5)
    assert found.dtype is dtype
    torch.testing.assert_close(found, wanted.to(dtype))


def routed(tokens, choices, count):
    ids = torch.stack([torch.randperm(count)[:choices] for _ in range(tokens)])
    return ids, draw(tokens, choices).softmax(-1)


def filled(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def test_experts_are_mixtrals():
    config = MixtralConfig(num_local_experts=4, hidden_size=8, intermediate_size=6)
    config._experts_implementation = "eager"
    module = filled(MixtralExperts(config))
    x, (ids, weights) = draw(7, 8), routed(7, 2, 4)
    found = experts(x, ids, weights, module.gate_up_proj, module.down_proj, activation="silu")
    torch.testing.assert_close(found, module(x, ids, weights))


def test_experts_are_gpt_oss():
    config = GptOssConfig(num_local_experts=4, hidden_size=8, intermediate_size=6)
    config._experts_implementation = "eager"
    module = filled(GptOssExperts(config))
    x, (ids, weights) = draw(7, 8) * 5, routed(7, 2, 4)
    found = experts(
        x,
        ids,
        weights,
        module.gate_up_proj.transpose(1, 2),
        module.down_proj.transpose(1, 2),
        module.gate_up_proj_bias,
        module.down_proj_bias,
        activation="silu",
        interleaved=True,
        limit=module.limit,
        alpha=module.alpha,
    )
    torch.testing.assert_close(found, module(x, ids, weights))


def test_one_token_may_choose_an_expert_twice():
    x, gate_up, down = draw(1, 8), draw(2, 12, 8), draw(2, 8, 6)
    once = experts(x, torch.tensor([[1]]), torch.ones(1, 1), gate_up, down, activation="silu")
    twice = experts(
        x, torch.tensor([[1, 1]]), torch.tensor([[0.25, 0.75]]), gate_up, down, activation="silu"
    )
    torch.testing.assert_close(twice, once)


def test_reductions_over_no_dimension_reduce_nothing():
    x = draw(3, 4)
    for name in ("sum", "mean", "amax", "amin", "prod"):
        assert torch.equal(schema(name).reference(x, dims=()), x)
    assert torch.equal(schema("any").reference(x, dims=()), x.bool())


def test_integer_reductions_keep_their_type():
    x = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    for name in ("sum", "prod", "amax"):
        assert schema(name).reference(x, dims=(0, 1)).dtype is torch.int32
    assert schema("cumsum").reference(x, dim=0).dtype is torch.int32
    byte = torch.tensor([0, 3], dtype=torch.uint8)
    assert schema("any").reference(byte, dims=(0,)).dtype is torch.bool

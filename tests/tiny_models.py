"""Tiny random Hugging Face models by family: float32, CPU, seeded, and hard to get right by luck.

Every parameter is drawn here rather than by the library's own initialisation: matrices are wide
enough that greedy tokens vary and the best two logits seldom tie; norm weights and biases are
moved off their trivial ones and zeros, so that a forgotten bias or a wrong norm changes the tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 160
MATRIX_STD = 0.2  # with a fan-in of 64 each matrix has a gain of 1.6
# An embedding that is the lm_head too must not win by answering with the token just read; where
# the model scales it up by sqrt(hidden_size), it has to start lower.
TIED_STD = 0.08
SCALED_STD = 0.04
SCALED = frozenset({"biogpt", "ctrl", "gemma2", "gemma3", "gemma4", "xglm"})
VECTOR_STD = 0.2
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
# Prompts of three lengths, one of them beyond the sliding windows of 8 below.
PROMPTS: tuple[list[int], ...] = tuple(
    [(37 * i + 11 * n + 3) % VOCAB for i in range(n)] for n in (4, 11, 21)
)
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# The older families spell the same sizes in their own ways.
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LOCAL_GLOBAL = ["sliding_attention", "full_attention"]


def _config(model_type: str, base: dict[str, object], **sizes: object) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**SPECIAL, **base, **sizes})


def _family(model_type: str, base: dict[str, object] = COMMON, **sizes: object):
    return partial(_config, model_type, base, **sizes)


# Draws whose greedy continuations of PROMPTS vary, with the best two logits over 0.002 apart.
# fmt: off
SALTS: dict[str, int] = {
    "mistral": 4, "qwen2": 1, "gemma2": 31, "gemma3": 36, "olmo2": 1,
    "gpt2": 1, "falcon": 2, "starcoder2": 1, "stablelm": 1, "granite": 7,
    "mixtral": 1, "llama_tied": 3, "phi3_longrope": 1, "falcon_new": 10, "falcon_alibi": 11,
    "starcoder2_window": 1, "bloom": 4, "mpt": 1, "gptj": 5, "gpt_neo": 4,
    "biogpt": 10, "xglm": 10, "gemma": 2, "vaultgemma": 2, "cohere": 2,
    "cohere2": 8, "glm": 2, "glm4_moe": 3, "persimmon": 11, "helium": 4,
    "arcee": 1, "bitnet": 1, "ministral": 2, "doge": 1, "dots1": 1,
    "nanochat": 1, "granite_swa": 1, "jais2": 3, "hyperclovax": 2, "minicpm3": 11,
    "jetmoe": 3, "flex_olmo": 2, "minimax_m2": 4, "ernie4_5_moe": 2, "gpt_neox_japanese": 5,
    "gemma4": 1, "ctrl": 8, "openai_gpt": 7, "qwen3_moe": 1, "gpt_oss": 2,
    "llama4": 1, "modernbert_decoder": 2, "mamba": 1, "rwkv": 1, "recurrent_gemma": 3,
    "qwen3_next": 3, "jamba": 1, "lfm2": 1,
}
# fmt: on

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    # The fifteen that must match Hugging Face token for token.
    "llama": _family("llama"),
    "mistral": _family("mistral", sliding_window=8),
    "qwen2": _family("qwen2"),
    "qwen3": _family("qwen3", head_dim=16),
    "gemma2": _family(
        "gemma2",
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=24,
        num_hidden_layers=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.0,
    ),
    "gemma3": _family(
        "gemma3_text",
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=24,
        layer_types=LOCAL_GLOBAL,
    ),
    "phi3": _family("phi3"),
    "olmo2": _family("olmo2"),
    "gpt2": _family("gpt2", GPT2),
    "gpt_neox": _family("gpt_neox", num_key_value_heads=None, rotary_pct=0.25),
    "falcon": _family("falcon", multi_query=True, new_decoder_architecture=False),
    "starcoder2": _family("starcoder2", sliding_window=None),
    "stablelm": _family("stablelm"),
    "granite": _family(
        "granite",
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.2,
    ),
    "mixtral": _family("mixtral", num_local_experts=4, num_experts_per_tok=2),
    # Variants of those, each with a switch that changes the graph.
    "llama_tied": _family("llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama_rope3": _family(
        "llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama_mha": _family("llama", num_key_value_heads=4),
    "llama_mqa": _family("llama", num_key_value_heads=1, head_dim=24),
    "qwen2_window": _family(
        "qwen2", use_sliding_window=True, sliding_window=8, layer_types=LOCAL_GLOBAL[::-1]
    ),
    "phi3_longrope": _family(
        "phi3",
        max_position_embeddings=256,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.3 * i for i in range(8)],
            "original_max_position_embeddings": 32,
        },
    ),
    "gpt_neox_serial": _family("gpt_neox", num_key_value_heads=None, use_parallel_residual=False),
    "falcon_new": _family("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "falcon_alibi": _family(
        "falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "stablelm_parallel": _family(
        "stablelm", use_parallel_residual=True, use_qkv_bias=True, qk_layernorm=True
    ),
    "starcoder2_window": _family("starcoder2", sliding_window=8),
    # Families nobody named.
    "opt": _family("opt", ffn_dim=96, word_embed_proj_dim=64),
    "bloom": _family("bloom", {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": _family(
        "mpt",
        {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    ),
    "gptj": _family("gptj", GPT2, rotary_dim=8),
    "codegen": _family("codegen", GPT2, rotary_dim=8, n_ctx=256),
    "gpt_neo": _family(
        "gpt_neo",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_layers": 2, "num_heads": 4},
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=256,
    ),
    "gpt_bigcode": _family("gpt_bigcode", GPT2),
    "biogpt": _family("biogpt"),
    "xglm": _family(
        "xglm",
        {"vocab_size": VOCAB, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96},
        max_position_embeddings=256,
    ),
    "phi": _family("phi"),
    "phimoe": _family("phimoe", num_local_experts=4, num_experts_per_tok=2),
    "gemma": _family("gemma", head_dim=16),
    "vaultgemma": _family("vaultgemma", head_dim=16, sliding_window=8, layer_types=LOCAL_GLOBAL),
    "cohere": _family("cohere", use_qk_norm=True, logit_scale=0.5),
    "cohere2": _family("cohere2", logit_scale=0.5, sliding_window=8, layer_types=LOCAL_GLOBAL),
    "olmo": _family("olmo", clip_qkv=2.0),
    "olmo3": _family("olmo3", sliding_window=8, layer_types=LOCAL_GLOBAL),
    "olmoe": _family("olmoe", num_experts=4, num_experts_per_tok=2),
    "glm": _family("glm", head_dim=16),
    "glm4": _family("glm4", head_dim=16),
    "glm4_moe": _family(
        "glm4_moe",
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
    ),
    "nemotron": _family("nemotron"),
    "persimmon": _family("persimmon"),
    "smollm3": _family("smollm3", num_hidden_layers=4),
    "helium": _family("helium", head_dim=16),
    "exaone4": _family("exaone4", sliding_window=8, layer_types=LOCAL_GLOBAL),
    "ernie4_5": _family("ernie4_5"),
    "hunyuan_v1_dense": _family("hunyuan_v1_dense", head_dim=16),
    "seed_oss": _family("seed_oss", head_dim=16),
    "apertus": _family("apertus"),
    "arcee": _family("arcee"),
    "bitnet": _family("bitnet"),
    "diffllama": _family("diffllama"),
    "ministral": _family("ministral", head_dim=16, sliding_window=8, layer_types=LOCAL_GLOBAL),
    "cwm": _family("cwm", head_dim=16, sliding_window=8, layer_types=LOCAL_GLOBAL),
    "doge": _family("doge"),
    "dots1": _family(
        "dots1",
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
    ),
    "nanochat": _family("nanochat"),
    "granite_swa": _family("granite_swa", sliding_window=8, layer_types=LOCAL_GLOBAL),
    "jais2": _family("jais2"),
    "internlm3": _family("internlm3", head_dim=16),
    "hyperclovax": _family("hyperclovax"),
    "minicpm3": _family(
        "minicpm3",
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "iquestcoder": _family("iquestcoder", head_dim=16),
    "jetmoe": _family("jetmoe", num_local_experts=4, num_experts_per_tok=2),
    "flex_olmo": _family("flex_olmo", num_experts=4, num_experts_per_tok=2),
    "granitemoeshared": _family(
        "granitemoeshared",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
    ),
    "minimax_m2": _family("minimax_m2", num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "ernie4_5_moe": _family(
        "ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=48, head_dim=16
    ),
    "hunyuan_v1_moe": _family("hunyuan_v1_moe", num_experts=4, moe_topk=2, head_dim=16),
    "gpt_neox_japanese": _family("gpt_neox_japanese", intermediate_multiple_size=2),
    "gemma4": _family(
        "gemma4_text",
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,
        layer_types=LOCAL_GLOBAL,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16,
        num_hidden_layers=2,
    ),
    "ctrl": _family("ctrl", GPT2, dff=96),
    "openai_gpt": _family("openai-gpt", GPT2),
    "granitemoe": _family("granitemoe", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _family("qwen2_moe", shared_expert_intermediate_size=48, **MOE),
    "qwen3_moe": _family("qwen3_moe", head_dim=16, **MOE),
    "dbrx": _family(
        "dbrx",
        {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    ),
    "gpt_oss": _family(
        "gpt_oss",
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=LOCAL_GLOBAL,
    ),
    "llama4": _family(
        "llama4_text",
        head_dim=16,
        num_local_experts=4,
        intermediate_size_mlp=96,
        attention_chunk_size=8,
        num_hidden_layers=4,
        moe_layers=[1, 3],
    ),
    "deepseek_v3": _family(
        "deepseek_v3",
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
    ),
    "modernbert_decoder": _family("modernbert-decoder", local_attention=8, pad_token_id=0),
    # Tokens mix outside attention here: to be refused with the place named.
    "mamba": _family(
        "mamba", {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4}
    ),
    "rwkv": _family(
        "rwkv",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 64},
    ),
    "recurrent_gemma": _family("recurrent_gemma", num_hidden_layers=3, lru_width=64, head_dim=16),
    "mamba2": _family(
        "mamba2",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2},
        num_heads=8,
        head_dim=16,
        state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
    "qwen3_next": _family(
        "qwen3_next",
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=48,
        **MOE,
    ),
    "jamba": _family(
        "jamba",
        mamba_d_state=4,
        mamba_expand=2,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=4,
        use_mamba_kernels=False,
    ),
    "lfm2": _family("lfm2", layer_types=["conv", "full_attention"]),
}

NAMED: tuple[str, ...] = tuple(FAMILIES)[:15]
RECURRENT: tuple[str, ...] = tuple(FAMILIES)[tuple(FAMILIES).index("mamba") :]


def tiny_config(name: str) -> PretrainedConfig:
    """The configuration of a family in `FAMILIES`."""
    return FAMILIES[name]()


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A causal LM of the family, in eval mode, with float32 weights drawn from `seed`.

    Tied weights stay tied. `generation_config.eos_token_id` is None, so that `generate` runs to
    its full length.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        # transformers before 5.2x picks sdpa, which drops the soft-capping of the configuration.
        model.set_attn_implementation("eager")
    # crc32, unlike hash(), is the same in each process; the generator takes 32 bits of a seed.
    salted = zlib.crc32(f"{name} {SALTS.get(name, 0)} {seed}".encode())
    generator = torch.Generator().manual_seed(salted)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied_std = SCALED_STD if name in SCALED else TIED_STD
    tied = head is not None and head.weight is embedding
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                shared = tied and parameter is embedding
                parameter.copy_((tied_std if shared else MATRIX_STD) * noise)
            else:
                parameter.add_(VECTOR_STD * noise)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def greedy(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What Hugging Face `generate` continues one prompt with, greedily and without an EOS."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
    return out[0, len(prompt) :].tolist()

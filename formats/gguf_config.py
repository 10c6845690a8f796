"""GGUF metadata → the configuration dict that Hugging Face has for the same model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import CheckpointError
from .gguf import GGUFCheckpoint

Config = dict[str, object]

# Metadata that would change the arithmetic in a way that none of the families below has.
_REFUSED = (
    "expert_count",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
)
# Llama 3.1's frequency bands (its released config.json); GGUF keeps only the resulting factors.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GEMMA3_LOCAL_PERIOD = 6  # five sliding layers, then a full one (Gemma 3 report, section 2)
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_27B_LAYERS = 62  # the one size whose query scale is hidden_size / heads, not head_dim


@dataclass(frozen=True, slots=True)
class Fields:
    """The metadata of one architecture, read by the part of the key behind its name."""

    checkpoint: GGUFCheckpoint
    architecture: str

    def get(self, key: str) -> object | None:
        """The value of `<architecture>.<key>`, or None."""
        return self.checkpoint.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive int; without a default a missing one raises CheckpointError."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value <= 0:
            raise self._wrong(key, "a positive integer", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float, as the shortest decimal of its 32 bits (1e-05, not 9.99999975e-06)."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._wrong(key, "a number", value)
        return float(str(np.float32(value)))

    def _wrong(self, key: str, expected: str, value: object) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.files()[0]}: metadata {self.architecture}.{key}",
            expected=expected,
            found="nothing" if value is None else repr(value)[:80],
            remedy="Convert the model again with a current llama.cpp.",
        )


def common_config(fields: Fields) -> Config:
    """The entries that all families share: sizes, epsilon, RoPE, token ids, tied embeddings."""
    checkpoint = fields.checkpoint
    for key in _REFUSED:
        if fields.get(key):
            raise CheckpointError(
                f"{checkpoint.files()[0]}: metadata {fields.architecture}.{key}",
                expected="a dense model without it",
                found=repr(fields.get(key)),
                remedy="Compile the Hugging Face folder of this model instead.",
            )
    num_heads, hidden_size = (
        fields.integer("attention.head_count"),
        fields.integer("embedding_length"),
    )
    head_dim = fields.integer("attention.key_length", hidden_size // num_heads)
    rotary = fields.integer("rope.dimension_count", head_dim)
    if rotary != head_dim or fields.integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{checkpoint.files()[0]}: metadata {fields.architecture}.rope.dimension_count",
            expected=f"RoPE and values of the whole head ({head_dim})",
            found=f"{rotary} and {fields.get('attention.value_length')}",
            remedy="Compile the Hugging Face folder of this model instead.",
        )
    token_ids = {
        f"{ours}_token_id": checkpoint.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "vocab_size": checkpoint.tensor("token_embd.weight").shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(fields),
        "tie_word_embeddings": "output.weight" not in checkpoint.names(),
        "dtype": "float32",
        **token_ids,
    }


def llama_config(fields: Fields) -> Config:
    """Llama, and Mistral, which llama.cpp writes as a llama (with a window if it has one)."""
    names = fields.checkpoint.names()
    config = common_config(fields)
    config["rope_parameters"] = _llama3_rope(fields, config)
    if fields.get("attention.sliding_window"):
        window = fields.integer("attention.sliding_window")
        identity = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        return {**identity, **config, "sliding_window": window, "hidden_act": "silu"}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **config,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_down.bias" in names,
    }


def qwen2_config(fields: Fields) -> Config:
    """Qwen 2 and 2.5: Llama with biases on q, k and v."""
    identity = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    return {**identity, **common_config(fields), "hidden_act": "silu", "use_sliding_window": False}


def qwen3_config(fields: Fields) -> Config:
    """Qwen 3: Llama with RMSNorm on each head's q and k."""
    identity = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    bias = "blk.0.attn_q.bias" in fields.checkpoint.names()
    return {**identity, **common_config(fields), "hidden_act": "silu", "attention_bias": bias}


def gemma3_config(fields: Fields) -> Config:
    """The text model of Gemma 3: five sliding-window layers to a full one, each with its RoPE."""
    config = common_config(fields)
    layers, heads = fields.integer("block_count"), fields.integer("attention.head_count")
    period = fields.integer("attention.sliding_window_pattern", _GEMMA3_LOCAL_PERIOD)
    kinds = [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)
    ]
    wide = layers == _GEMMA3_27B_LAYERS
    scalar = fields.integer("embedding_length") // heads if wide else config["head_dim"]
    local = {"rope_type": "default", "rope_theta": _GEMMA3_LOCAL_THETA}
    softcap = fields.get("final_logit_softcapping")
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        **config,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": kinds,
        "sliding_window": fields.integer("attention.sliding_window"),
        "query_pre_attn_scalar": scalar,
        "rope_parameters": {
            "sliding_attention": local,
            "full_attention": config["rope_parameters"],
        },
        "final_logit_softcapping": fields.number("final_logit_softcapping") if softcap else None,
    }


def _rope(fields: Fields) -> Config:
    theta = fields.number("rope.freq_base", 10_000.0)
    kind = fields.get("rope.scaling.type") or "none"
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"{fields.checkpoint.files()[0]}: metadata {fields.architecture}.rope.scaling.type",
            expected="one of none, linear, yarn",
            found=repr(kind),
            remedy="Compile the Hugging Face folder of this model instead.",
        )
    rope: Config = {
        "rope_type": kind,
        "rope_theta": theta,
        "factor": fields.number("rope.scaling.factor"),
    }
    if kind == "yarn":
        context = fields.integer("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = context
    return rope


def _llama3_rope(fields: Fields, config: Mapping[str, object]) -> Config:
    """Recover Llama 3.1's RoPE scaling from the tensor of factors, and prove that it is it."""
    rope = _rope(fields)
    if "rope_freqs.weight" not in fields.checkpoint.names():
        return rope
    stored = fields.checkpoint.tensor("rope_freqs.weight").load().double().numpy()
    rope |= {"rope_type": "llama3", "factor": float(stored.max()), **_LLAMA3_ROPE}
    expected = _llama3_factors(int(str(config["head_dim"])), rope)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise CheckpointError(
            f"{fields.checkpoint.files()[0]}: tensor 'rope_freqs.weight'",
            expected="the RoPE factors of Llama 3.1",
            found=f"{stored.size} other factors, from {stored.min():.4g} to {stored.max():.4g}",
            remedy="Compile the Hugging Face folder of this model instead.",
        )
    return rope


def _llama3_factors(
    head_dim: int, rope: Mapping[str, object]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What divides each frequency: 1 for short waves, `factor` for long ones, a blend between."""
    theta, factor, low, high, context = (
        float(str(rope[key])) for key in ("rope_theta", "factor", *_LLAMA3_ROPE)
    )
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    blend = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    factors: np.ndarray[tuple[int], np.dtype[np.float64]] = 1 / ((1 - blend) / factor + blend)
    return factors


CONFIGS: Mapping[str, Callable[[Fields], Config]] = {
    "llama": llama_config,
    "qwen2": qwen2_config,
    "qwen3": qwen3_config,
    "gemma3": gemma3_config,
}
"""The known architectures, by their GGUF name."""

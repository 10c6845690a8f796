"""SmolLM2 as Hugging Face has it, read from the GGUF by the gguf package alone: an oracle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def hugging_face_model(path: Path) -> LlamaForCausalLM:
    """The model in float32, weights dequantized by gguf."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    reader = gguf.GGUFReader(path)

    def field(name: str) -> float:
        return reader.get_field(f"llama.{name}").contents()

    config = LlamaConfig(
        vocab_size=len(reader.get_field("tokenizer.ggml.tokens").data),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):  # there are no weights to draw
        model = LlamaForCausalLM._from_config(config, dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    state = {}
    for name, parameter in model.named_parameters():
        tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:  # llama.cpp keeps a rotary pair side by side, Hugging Face in halves
                values = values.unflatten(0, (count, -1, 2)).transpose(1, 2)
        state[name] = values.reshape(parameter.shape).contiguous()
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert unexpected == []
    assert missing == ["lm_head.weight"]
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its tables are on no device
    return model.requires_grad_(False).eval()


def write_folder(gguf_file: Path, model: LlamaForCausalLM, folder: Path) -> None:
    """config.json, *.safetensors and the tokenizer, as Hugging Face writes them."""
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)

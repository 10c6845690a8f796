"""Tiny GGUF files made from tiny Hugging Face models, as llama.cpp's converter would make them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

TEXT = "the quick brown fox jumps over the lazy dog and runs away from the other foxes. " * 8
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HF_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}


def tiny_bpe(vocab_size: int = 320) -> Tokenizer:
    """A byte-level BPE tokenizer in SmolLM's manner, trained on one sentence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def tiny_hf_model(architecture: str = "llama", **sizes: object) -> PreTrainedModel:
    """A 2-layer random model of the Hugging Face family behind a GGUF architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common: dict[str, object] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": architecture == "gemma3",
    }
    if architecture == "gemma3":
        common |= {"sliding_window": 8, "query_pre_attn_scalar": 16}
        common["layer_types"] = ["sliding_attention"] * 2
    config = AutoConfig.for_model(HF_TYPES[architecture], **{**common, **sizes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1))
    return model


def write_tiny_gguf(
    path: Path,
    architecture: str = "llama",
    quantization: str | Sequence[str] = "F32",
    model: PreTrainedModel | None = None,
    fields: Mapping[str, object] | None = None,
    tokenizer: bool = True,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> PreTrainedModel:
    """Write a GGUF file and return the Hugging Face model that it holds.

    Args:
        path: where to.
        architecture: llama, qwen2, qwen3 or gemma3.
        quantization: ggml type of the matrices: F32, F16, BF16, Q8_0, Q4_0 or Q4_1; with one of
            Q4_K, Q5_K and Q6_K they are random blocks, and not the model's numbers. Several are
            taken in turns.
        model: the model to write; a tiny random one without it.
        fields: metadata to add or override (None leaves the key out), without the architecture.
        tokenizer: whether to add a tokenizer and a chat template.
        tensors: further float32 tensors by GGUF name.
    """
    model = model if model is not None else tiny_hf_model(architecture)
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    metadata: dict[str, object] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": _theta(config.rope_parameters),
    }
    if architecture == "gemma3":
        metadata["attention.sliding_window"] = config.sliding_window
    for key, value in {**metadata, **(fields or {})}.items():
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
    if tokenizer:
        _add_tokenizer(writer, tiny_bpe(config.vocab_size))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.astype(np.float32))
    kinds = cycle([quantization] if isinstance(quantization, str) else quantization)
    for (name, tensor), kind in zip(_tensors(model, architecture).items(), kinds, strict=False):
        _add_tensor(writer, name, tensor, kind)
    finish(writer)
    return model


def random_blocks(form: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random bytes of quantized rows, uint8 [rows, bytes]: any codes and small scales, with groups
    that have none.
    """
    rng = np.random.default_rng(seed)
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    places = {"Q6_K": (208,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(form, (0,))
    small = 1e-4 if form.endswith("_K") else 0.01
    for place in places:
        scales = (
            rng.standard_normal((rows, blocks, 1)) * small * (rng.random((rows, blocks, 1)) > 0.1)
        )
        data[..., place : place + 2] = scales.astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def write_tensors(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]]) -> None:
    """Write a GGUF file of nothing but tensors: by name the bytes of their rows, and the type."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (data, form) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[form])
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _theta(rope: Mapping[str, object]) -> float:
    inner = rope.get("full_attention", rope)
    return float(inner["rope_theta"])


def _add_tokenizer(writer: gguf.GGUFWriter, backend: Tokenizer) -> None:
    vocab = sorted(backend.get_vocab(), key=backend.token_to_id)
    model = json.loads(backend.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in vocab])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    """The state dict under GGUF names, with what llama.cpp's converter changes."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if architecture == "llama" and "q_proj" in name:
            array = interleave_halves(array, model.config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            array = interleave_halves(array, model.config.num_key_value_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        tensors[gguf_name] = array
    return tensors


def interleave_halves(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Row by row: (x0, x1, …, y0, y1, …) → (x0, y0, x1, y1, …) in each head."""
    head_dim = array.shape[0] // num_heads
    rows = []
    for head in range(num_heads):
        for i in range(head_dim // 2):
            rows += [head * head_dim + i, head * head_dim + head_dim // 2 + i]
    return np.ascontiguousarray(array[rows])


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, quantization: str) -> None:
    kind = gguf.GGMLQuantizationType[quantization]
    if array.ndim == 1 or quantization == "F32":
        writer.add_tensor(name, array.astype(np.float32))
    elif quantization == "F16":
        writer.add_tensor(name, array.astype(np.float16))
    elif quantization.endswith("_K"):
        data = random_blocks(quantization, len(array), array.shape[1] // 256, len(name))
        writer.add_tensor(name, data, raw_dtype=kind)
    else:
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

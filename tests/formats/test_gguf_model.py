"""A GGUF file gives the config and the weights of the Hugging Face model that it was made from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tilewright.errors import CheckpointError
from tilewright.formats.gguf_model import GGUFModel, read_gguf_model
from tiny_gguf import tiny_hf_model, write_tiny_gguf

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3"]


def rebuilt(model: GGUFModel):
    """A Hugging Face model from our config and weights alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(model.config)
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    result = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {name: weight.load() for name, weight in model.weights.items()}
    result.load_state_dict(weights, strict=True)
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_match_the_source(architecture: str, tmp_path: Path):
    source = write_tiny_gguf(tmp_path / "m.gguf", architecture)
    model = read_gguf_model(tmp_path / "m.gguf")
    tokens = torch.arange(3, 24)[None]
    with torch.no_grad():
        expected, actual = source(tokens).logits, rebuilt(model)(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_matches_the_source(architecture: str, tmp_path: Path):
    source = write_tiny_gguf(tmp_path / "m.gguf", architecture).config.to_dict()
    config = read_gguf_model(tmp_path / "m.gguf").config
    assert config["architectures"][0].endswith("ForCausalLM")
    skipped = {"architectures", "dtype", "rope_parameters"}
    for key in config.keys() - skipped:
        assert config[key] == source[key], key
    flat, wanted = config["rope_parameters"], source["rope_parameters"]
    assert flat == {**wanted} if "rope_theta" in wanted else flat.keys() == wanted.keys()


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantized_weights_stay_close(quantization: str, tmp_path: Path):
    source = write_tiny_gguf(tmp_path / "m.gguf", "llama", quantization)
    weights = read_gguf_model(tmp_path / "m.gguf").weights
    steps = {"F16": 1e-3, "BF16": 8e-3, "Q8_0": 8e-3, "Q4_0": 0.13, "Q4_1": 0.13}
    for name, tensor in source.state_dict().items():
        error = (weights[name].load() - tensor).abs().max()
        assert error <= steps[quantization] * tensor.abs().max(), name


def test_tied_embedding_is_one_expression(tmp_path: Path):
    write_tiny_gguf(tmp_path / "m.gguf", model=tiny_hf_model(tie_word_embeddings=True))
    model = read_gguf_model(tmp_path / "m.gguf")
    assert model.config["tie_word_embeddings"] is True
    assert model.weights["lm_head.weight"] == model.weights["model.embed_tokens.weight"]


def test_untied_head_is_its_own(tmp_path: Path):
    write_tiny_gguf(tmp_path / "m.gguf")
    model = read_gguf_model(tmp_path / "m.gguf")
    assert model.config["tie_word_embeddings"] is False
    assert model.weights["lm_head.weight"] != model.weights["model.embed_tokens.weight"]


def test_sliding_window_makes_a_mistral(tmp_path: Path):
    write_tiny_gguf(tmp_path / "m.gguf", fields={"attention.sliding_window": 8})
    config = read_gguf_model(tmp_path / "m.gguf").config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 8)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recovered(factor: float, tmp_path: Path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    config = LlamaConfig(head_dim=64, hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    path = tmp_path / "m.gguf"
    source = tiny_hf_model(head_dim=64, rope_parameters=rope)
    _write_with_rope_freqs(path, source, (plain / scaled).numpy())
    recovered = read_gguf_model(path).config["rope_parameters"]
    assert recovered == pytest.approx(rope)
    _write_with_rope_freqs(path, source, (plain / scaled).numpy() + 0.5)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        read_gguf_model(path)


def _write_with_rope_freqs(path: Path, source: object, factors: np.ndarray) -> None:
    write_tiny_gguf(path, model=source, tensors={"rope_freqs.weight": factors})


def test_linear_and_yarn_scaling(tmp_path: Path):
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    scaling["rope.scaling.original_context_length"] = 64
    write_tiny_gguf(tmp_path / "m.gguf", "qwen2", fields=scaling)
    rope = read_gguf_model(tmp_path / "m.gguf").config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 4.0)
    assert rope["original_max_position_embeddings"] == 64
    write_tiny_gguf(tmp_path / "m.gguf", "qwen2", fields={"rope.scaling.type": "su"})
    with pytest.raises(CheckpointError, match="none, linear, yarn"):
        read_gguf_model(tmp_path / "m.gguf")


@pytest.mark.quick
def test_smollm2(smollm2_gguf: Path):
    model = read_gguf_model(smollm2_gguf)
    assert model.config["model_type"] == "llama"
    assert model.config["rms_norm_eps"] == 1e-5
    assert (model.config["num_hidden_layers"], model.config["vocab_size"]) == (30, 49152)
    assert len(model.weights) == 30 * 9 + 3
    assert model.weights["model.layers.3.self_attn.k_proj.weight"].shape == (192, 576)


def test_unknown_architecture_lists_the_known(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_tensor("x", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="gemma3, llama, qwen2, qwen3, found 'rwkv7'"):
        read_gguf_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"expert_count": 8}, "expert_count"),
        ({"block_count": None}, "block_count"),
        ({"rope.dimension_count": 8}, "rope.dimension_count"),
        ({"block_count": 1}, "blk.1"),
        ({"block_count": 3}, "blk.2"),
        ({"attention.head_count": 3}, "shapes"),
        ({"attention.layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], culprit: str, tmp_path: Path):
    write_tiny_gguf(tmp_path / "m.gguf", fields=fields)
    with pytest.raises(CheckpointError, match=culprit):
        read_gguf_model(tmp_path / "m.gguf")

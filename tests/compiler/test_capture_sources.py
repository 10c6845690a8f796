"""What compile() can be given, opened as a Source, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.compiler.sources import open_source
from tilewright.errors import CaptureError, CheckpointError, UsageError
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture
def folder(llama_folder, tmp_path):
    return shutil.copytree(llama_folder, tmp_path / "model")


def edit(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def loaded(source, captured):
    return {
        name: source.weights[name].load() if name in source.weights else tensor
        for name, tensor in captured.weights.items()
    }


@pytest.mark.parametrize("family", ["llama", "mixtral", "llama_tied"])
def test_a_folder_gives_the_logits_of_its_model(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    source = open_source(str(tmp_path))
    assert {p.device.type for p in source.module.parameters()} == {"meta"}
    captured = capture_causal_lm(source.module)
    ids = torch.randint(3, 150, (1, 11))
    with torch.no_grad():
        wanted = model(ids).logits
    found = captured.run([ids], loaded(source, captured))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


def test_experts_stored_one_by_one_are_stacked(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    weight = source.weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert "experts.3.w1.weight" in str(weight) and "concat" in str(weight)
    assert torch.equal(weight.load(), model.model.layers[0].mlp.experts.gate_up_proj)


def test_what_a_folder_tells(llama_folder):
    source = open_source(llama_folder)
    assert (source.kind, source.is_causal_lm) == ("folder", True)
    assert source.eos_token_ids == (2, 7)
    assert source.max_position_embeddings == 256
    assert source.tokenizer is None


def test_dtype_is_that_of_the_parameters(llama_folder):
    source = open_source(llama_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in source.module.parameters()} == {torch.bfloat16}
    assert {w.dtype for w in source.weights.values()} == {torch.bfloat16}


def test_gguf(smollm2_gguf):
    source = open_source(smollm2_gguf)
    assert source.kind == "gguf" and source.tokenizer == smollm2_gguf
    assert source.max_position_embeddings == 8192
    assert set(source.weights) == set(source.module.state_dict())


def test_objects():
    model = tiny_model("llama")
    source = open_source(model)
    assert (source.kind, source.module, source.is_causal_lm) == ("model", model, True)
    assert source.weights["lm_head.weight"].load() is not None
    plain = nn.Linear(3, 3)
    source = open_source(plain)
    assert (source.kind, source.module, source.is_causal_lm) == ("module", plain, False)
    assert torch.equal(source.weights["weight"].load(), plain.weight)


@pytest.mark.quick
@pytest.mark.parametrize("given", [3, None, ["path"]])
def test_wrong_kinds(given):
    with pytest.raises(UsageError, match="nn.Module"):
        open_source(given)


@pytest.mark.quick
def test_missing_path_and_wrong_file(tmp_path):
    with pytest.raises(CheckpointError, match="nothing there"):
        open_source(tmp_path / "absent")
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"x\.bin"):
        open_source(tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"model_type": "lllama"}, CaptureError, "llama"),
        ({"model_type": None, "architectures": None}, CaptureError, "none"),
        ({"architectures": ["LlamaForTokenClassification"]}, CaptureError, "LlamaForCausalLM"),
        (
            {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}},
            CaptureError,
            "trust_remote_code",
        ),
        ({"quantization_config": {"quant_method": "hqq"}}, CheckpointError, "hqq"),
        ({"num_hidden_layers": 3}, CheckpointError, r"no tensor for model\.layers\.2"),
        ({"num_hidden_layers": 1}, CheckpointError, r"no place for model\.layers\.1"),
        ({"intermediate_size": 97}, CheckpointError, r"shape \[97, 64\]"),
        ({"tie_word_embeddings": True}, CheckpointError, "lm_head"),
        ({"hidden_act": "nothing"}, CaptureError, "nothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_that_does_not_fit(folder, fields, error, words):
    edit(folder, **fields)
    with pytest.raises(error, match=words):
        open_source(folder)


def test_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        open_source(folder)


def test_no_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        open_source(folder)

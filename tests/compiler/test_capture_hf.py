"""Hugging Face causal LMs through their hooks, against the models themselves."""

from __future__ import annotations

import time

import pytest
import torch

from captured_models import captured_model
from tilewright.compiler.capture_types import Captured
from tilewright.compiler.hf_model import capture_causal_lm, meta_causal_lm
from tilewright.errors import CaptureError
from tiny_models import NAMED, tiny_config, tiny_model

ATTENTION = torch.ops.tilewright.attention.default
EXPERTS = torch.ops.tilewright.moe_experts.default
MASKED = torch.ops.tilewright.mask_scores.default
MIXTURES = {"mixtral", "gpt_oss"}  # llama4 multiplies by all its experts
# (window, chunk, softcap) of each layer, where it is not (None, None, None)
LAYERS = {
    "mistral": [(8, None, None)] * 2,
    "gemma2": [(8, None, 2.0), (None, None, 2.0)] * 2,
    "gemma3": [(8, None, None), (None, None, None)],
    "qwen2_window": [(None, None, None), (8, None, None)],
    "llama4": [(None, 8, None)] * 3 + [(None, None, None)],
    "gpt_oss": [(8, None, None), (None, None, None)],
}
MORE = ("qwen2_window", "llama4", "gpt_oss")


def check_numbers(captured: Captured, model, lengths=(1, 12)) -> None:
    for length in lengths:
        ids = torch.randint(3, 150, (1, length))
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits
        torch.testing.assert_close(captured.run([ids])[0], wanted, rtol=1e-5, atol=2e-5)


def calls(captured: Captured, target) -> list:
    return captured.graph_module.graph.find_nodes(op="call_function", target=target)


@pytest.mark.parametrize("family", [*NAMED, *MORE])
def test_family_gives_one_attention_a_layer_and_the_same_logits(family):
    model, captured = captured_model(family)
    check_numbers(captured, model)
    layers = model.config.get_text_config().num_hidden_layers
    found = [(call.args[7], call.args[8], call.args[9]) for call in calls(captured, ATTENTION)]
    assert found == LAYERS.get(family, [(None, None, None)] * layers)
    assert bool(calls(captured, EXPERTS)) == (family in MIXTURES)
    assert captured.route == ("masks" if family == "falcon" else "hook")
    (ids,) = captured.inputs
    assert ids.name == "input_ids" and ids.dims == (1, captured.symbols[0].name)
    assert captured.symbols[0].upper == model.config.max_position_embeddings


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_models_with_arithmetic_of_their_own(family):
    model = tiny_model(family)
    captured = capture_causal_lm(model)
    check_numbers(captured, model)
    assert (captured.route, len(calls(captured, MASKED))) == {
        "bloom": ("masks", 2),
        "mpt": ("plain", 0),
    }[family]
    assert bool(captured.notes) == (family == "mpt")


@pytest.mark.parametrize("family", ["mixtral", "llama_tied"])
def test_capture_without_weights_gives_the_same_graph(family):
    model = tiny_model(family)
    real = capture_causal_lm(model)
    bare = meta_causal_lm(tiny_config(family))
    captured = capture_causal_lm(bare)
    assert str(captured.graph_module.graph) == str(real.graph_module.graph)
    assert captured.weight_of == real.weight_of
    for name, weight in captured.weights.items():
        own = real.weights[name]
        assert (weight.shape, weight.dtype) == (own.shape, own.dtype)
        assert weight.device.type == ("cpu" if "inv_freq" in name else "meta")
    assert {parameter.device.type for parameter in bare.parameters()} == {"meta"}
    ids = torch.randint(3, 150, (1, 9))
    merged = {**captured.weights, **{n: w for n, w in real.weights.items() if "inv_freq" not in n}}
    torch.testing.assert_close(captured.run([ids], merged), real.run([ids]))


def test_long_rope_picks_its_table_by_length_and_leaves_the_model_alone():
    model = tiny_model("phi3_longrope")
    captured = capture_causal_lm(model)
    assert not hasattr(model.model.rotary_emb, "long_inv_freq")
    check_numbers(captured, model, (5, 32, 33, 60))


def test_the_model_is_left_as_it_was():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model("qwen2_moe").train()
    model.model.layers[0].eval()

    def state():
        parts = [part.training for part in model.modules()]
        config = model.config
        return (
            parts,
            config._attn_implementation,
            config._experts_implementation,
            sorted(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
            sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
            torch.nn.functional.scaled_dot_product_attention,
        )

    before = state()
    capture_causal_lm(model)
    assert state() == before

    model.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(CaptureError, match="Qwen2MoeForCausalLM"):
        capture_causal_lm(model)
    del model.forward
    assert state() == before


def test_data_dependent_experts_are_refused_with_their_line(capfd):
    with pytest.raises(CaptureError, match=r"modeling_dbrx\.py:\d+"):
        capture_causal_lm(tiny_model("dbrx"))
    assert "def forward" not in capfd.readouterr().err


def test_a_recurrent_model_is_refused_with_its_layer():
    with pytest.raises(CaptureError, match=r"layers\.0\.mixer.*recurrence"):
        capture_causal_lm(tiny_model("mamba"))


def test_a_large_model_takes_no_memory():
    from transformers import LlamaConfig

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    config = LlamaConfig(**sizes, num_key_value_heads=8, num_hidden_layers=2, vocab_size=128256)
    start = time.process_time()
    model = meta_causal_lm(config)
    assert time.process_time() - start < 5
    weights = capture_causal_lm(model).weights
    assert sum(weight.numel() for weight in weights.values()) > 3_000_000_000

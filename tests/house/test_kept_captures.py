"""What is kept of captures for a session of tests is what a capture of the model at hand gives."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kept_captures import kept_captures
from tilewright.compiler import hf_model
from tiny_models import tiny_config


def one_layer() -> PreTrainedModel:
    config = tiny_config("llama")
    config.num_hidden_layers = 1
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_second_model_gets_the_same_graph_and_its_own_weights() -> None:
    first = one_layer()
    with kept_captures():
        old = hf_model.capture_causal_lm(first)
        second = copy.deepcopy(first)
        with torch.no_grad():
            second.lm_head.weight.add_(1)
        new = hf_model.capture_causal_lm(second)
    assert new.program is old.program and new.weight_of == old.weight_of
    held = dict(second.named_parameters())
    assert all(new.weights[name] is held[name] for name in held)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(new.run([ids])[0], second(ids).logits)


def test_what_differs_in_config_type_or_code_is_captured_anew() -> None:
    model = one_layer()
    others = [copy.deepcopy(model) for _ in range(3)]
    others[0].config.rms_norm_eps *= 2
    others[1].to(torch.bfloat16)
    mlp = others[2].model.layers[0].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * 2
    with kept_captures():
        programs = [hf_model.capture_causal_lm(one).program for one in (model, *others)]
    assert len(set(map(id, programs))) == 4

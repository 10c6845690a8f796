"""Decoders as TensorRT networks, by the reference of the layers, beside Hugging Face."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewright as tw
from tensorrt_running import (
    ROOM,
    Running,
    agrees_with_hugging_face,
    graph_of,
    lowered,
    ragged_logits,
    reads,
)
from tilewright.codegen.tensorrt.decoder import lower_decoder
from tilewright.errors import UnsupportedError
from tilewright.ir.build import input_node, make, param
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.types import TensorType
from tiny_models import tiny_model


def test_logits_and_tokens_are_hugging_faces() -> None:
    agrees_with_hugging_face(lowered("llama", "float32"), tiny_model("llama"))


@pytest.mark.nightly
@pytest.mark.parametrize(
    "family",
    ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt2", "gpt_neox", "falcon",
     "starcoder2", "stablelm", "granite", "llama_mqa", "bloom", "mpt", "gptj", "gemma4"],
)  # fmt: skip
def test_every_family_of_dense_decoders(family: str) -> None:
    agrees_with_hugging_face(lowered(family, "float32"), tiny_model(family))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.nightly)])
def test_sixteen_bits_are_as_close_to_the_truth_as_torch(dtype: str) -> None:
    found = lowered("llama", dtype)
    assert {tensor.dtype.torch for tensor in found.network.inputs[3:]} == {getattr(torch, dtype)}
    narrow = tiny_model("llama").to(getattr(torch, dtype))
    # The reference rounds where the model does, so torch's own error is the measure.
    truth = tiny_model("llama").to(getattr(torch, dtype)).double()
    for row, logits in ragged_logits(found, narrow.config.vocab_size):
        ids = torch.tensor([row])
        with torch.no_grad():
            wanted, torchs = truth(ids).logits[0], narrow(ids).logits[0].double()
        ours, theirs = ((x - wanted).square().mean().sqrt() for x in (logits.double(), torchs))
        assert ours < 1.25 * theirs, f"{ours} beside torch's {theirs}"


def test_layers_of_a_decoder() -> None:
    network = lowered("llama", "bfloat16").network
    counts = {kind: len(reads(network, kind)) for kind in ("attention", "kv_cache_update")}
    assert counts == {"attention": 2, "kv_cache_update": 4}
    updates = {layer.output for layer in reads(network, "kv_cache_update")}
    presents = {value for name, value in network.outputs.items() if name != "logits"}
    assert presents == updates  # TensorRT wants them as outputs, unchanged
    assert len({layer.inputs[-1] for layer in reads(network, "attention")}) == 1  # one mask
    assert len(reads(network, "rotary_embedding")) == 4
    text = str(network)
    assert "input input_ids: i64[batch, length]" in text
    assert f"past_key_values.0.key: bf16[batch, 2, {ROOM}, 16]" in text


@settings(max_examples=5)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    cut=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_a_prompt_in_pieces_is_a_prompt(lengths: list[int], cut: int, seed: int) -> None:
    """Whatever the pieces, whatever the others in the batch: padding is overwritten."""
    found, longest = lowered("llama", "float32"), max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(160, (len(lengths), longest), generator=generator)
    whole = Running(found, len(lengths))(ids, [0] * len(lengths))
    running, starts = Running(found, len(lengths)), range(0, longest, cut)
    pieces = [running(ids[:, at : at + cut], [at] * len(lengths)) for at in starts]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("config", "codes"),
    [
        (tw.QuantConfig("int4", 32, method="rtn"), "i4["),
        (tw.QuantConfig("int4", method="rtn"), "i4["),  # rows shorter than a group
        (tw.QuantConfig("int8-weight", method="rtn"), "i8["),
        (tw.QuantConfig("fp8-weight", method="rtn"), "f8e4m3["),
    ],
)
def test_weights_in_codes_are_the_interpreters(config: tw.QuantConfig, codes: str) -> None:
    graph = graph_of("llama", "float32", config)
    found = lower_decoder(graph, {}, ROOM)
    assert str(found.network).count(codes) == 8  # qkv, o, gate and up, down of two layers
    ids = torch.arange(7) * 5
    caches = [torch.zeros(1, c.heads, ROOM, c.width) for c in found.caches]
    lens = torch.tensor([7], dtype=torch.int32)
    weights = {name: weight.load() for name, weight in graph.weights.items()}
    with torch.no_grad():
        wanted = interpret(graph, [ids, torch.arange(7), lens, torch.arange(7), *caches], weights)
    logits = Running(found, 1)(ids[None], [0])
    torch.testing.assert_close(logits[0], wanted[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (tw.QuantConfig("int4", 32, symmetric=False, method="rtn"), "with zero points"),
        (tw.QuantConfig("int4", 64, method="rtn"), "whose 96 columns end within a group"),
        (tw.QuantConfig("fp8", method="rtn"), "scales are made at run time, and 7 like it"),
        (tw.QuantConfig("fp8-block", method="rtn"), "made at run time"),
    ],
)
def test_codes_that_tensorrt_has_not(config: tw.QuantConfig, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why) as caught:
        lower_decoder(graph_of("llama", "float32", config), {}, ROOM)
    assert "such ops, and outside of TensorRT" in str(caught.value)


def test_the_boundary_is_told() -> None:
    """What stays outside: which ops those are, where, and how many others would go."""
    ids = input_node("token_ids", TensorType(DType.I64, (symbol("T"),)))
    x = make("embedding", param("table", TensorType(DType.F32, (9, 4))), ids)
    first = make("cumsum", x, dim=1)
    second = make("cumsum", make("neg", first), dim=1)
    graph = Graph("g", (ids,), (make("flip", second, dims=(1,)),))
    with pytest.raises(UnsupportedError) as caught:
        lower_decoder(graph, {first: "layers.0"}, ROOM)
    wanted = ("op cumsum: f32[T, 4]", "2 such ops", "cumsum in layers.0 (no layer computes it",
              "and 1 like it", "flip (", "--emit onnx")  # fmt: skip
    for part in wanted:
        assert part in str(caught.value)

"""Decoders that we emitted, compiled again: our own KV cache, and Hugging Face's tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch

import tilewright as tw
from emitted_running import Running
from tilewright.compiler.onnx_import.decoder import OnnxDecoder, facts_of, is_decoder
from tilewright.compiler.onnx_import.model import Input, Model, Step
from tilewright.compiler.onnx_import.reader import read_onnx
from tilewright.compiler.onnx_import.source import open_onnx
from tilewright.formats.stored_codes import codes_of
from tilewright.runtime.engine import CausalLMEngine
from tiny_models import PROMPTS, tiny_model

ROOM, NEW = 64, 8


@cache
def emitted(flavor: str, quantize: str | None = None) -> Path:
    """A tiny Mistral, whose windows are shorter than two of the prompts, as an emitted folder."""
    folder = Path(mkdtemp(prefix="tilewright-")) / flavor
    config = tw.QuantConfig("int4", group=32) if quantize else None
    tw.export_onnx(
        tiny_model("mistral"), folder, flavor=flavor, quantize=config, max_model_len=ROOM,
        verify="off",
    )  # fmt: skip
    return folder


def test_a_compiled_file_gives_the_same_tokens() -> None:
    path = emitted("standard") / "model.onnx"
    assert is_decoder(read_onnx(path))
    engine = tw.compile(path, backend="eager", verify="off")
    assert isinstance(engine, CausalLMEngine)
    assert engine.image.lm is not None and engine.image.lm.max_model_len == ROOM
    params = tw.SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    found = engine.generate([list(prompt) for prompt in PROMPTS], params)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert list(completion.token_ids) == greedy(prompt)
    passed = engine.image.graphs[-1][1]
    assert passed.count("paged_attention(") == 2 and "aten(" not in passed


def greedy(prompt: list[int]) -> list[int]:
    """Hugging Face's own continuation."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, tiny_model("mistral")(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("flavor", ["standard", "onnxruntime"])
def test_linears_in_codes_stay_in_codes(flavor: str) -> None:
    """And the numbers over a whole sequence are those of onnxruntime over the file."""
    folder = emitted(flavor, "int4")
    source = open_onnx(folder / "model.onnx")
    coded = {name: weight for name, weight in source.weights.items() if codes_of(weight)}
    assert len(coded) == 8 and source.quantized_by == "onnx"
    module = source.module
    assert isinstance(module, OnnxDecoder)
    for name, weight in coded.items():
        path, _, last = name.rpartition(".")
        value = torch.nn.Parameter(weight.load(), requires_grad=False)
        module.get_submodule(path).register_parameter(last, value)
    ids = np.array([PROMPTS[2]])
    wanted = Running(folder, 1)(ids, [0])
    found = module(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-3, rtol=2e-3)


def with_inputs(
    *inputs: Input, outputs: tuple[str, ...] = ("logits",), reads: str = "TensorScatter"
) -> Model:
    """A file of which nothing is known but its names, and the op that reads its caches."""
    step = Step(reads, "", 24, "it", (KEY.name, "k"), ("present",), {})
    return Model("model.onnx", inputs, outputs, (step,), {}, {})


IDS = Input("input_ids", torch.int64, ("batch", "length"))
KEY = Input("past_key_values.0.key", torch.float32, ("batch", 2, "cache_length", 16))


def test_what_is_a_decoder() -> None:
    assert is_decoder(with_inputs(IDS)) and is_decoder(with_inputs(IDS, KEY))
    for other in (
        with_inputs(KEY),
        with_inputs(IDS, KEY, reads="Concat"),  # caches that grow
        with_inputs(IDS, outputs=("last_hidden_state",)),
        with_inputs(IDS, Input("attention_mask", torch.int64, ("batch", "length"))),
        with_inputs(IDS, Input(KEY.name, KEY.dtype, ("batch", 2, 128, 16))),
        with_inputs(Input("input_ids", torch.int64, (2, "length"))),
        with_inputs(Input("input_ids", torch.int32, ("batch", "length"))),
    ):
        assert not is_decoder(other)


def test_what_a_folder_tells() -> None:
    assert facts_of({"eos_token_ids": [2, 3], "max_length": 64}) == ((2, 3), 64)
    assert facts_of({}) == ((), None) == facts_of({"eos_token_ids": "x", "max_length": "y"})

"""Engines of GGUF files in codes: the numbers of the file expanded by gguf, and what is packed."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import tilewright as tw
from cli_running import run
from tilewright.errors import UsageError
from tilewright.formats.gguf_model import read_gguf_model
from tilewright.formats.weight_ggml import BLOCK_FORMS
from tiny_gguf import tiny_hf_model, write_tiny_gguf

IDS = torch.arange(3, 14)[None]
OPTIONS = {"backend": "onnxruntime", "max_model_len": 64, "max_batch_size": 1}
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}


def _write(path: Path, forms: str | list[str]) -> torch.Tensor:
    """A file, and the logits that Hugging Face has for its numbers, which gguf makes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny_hf_model("llama", **({} if isinstance(forms, str) else SIZES))
    write_tiny_gguf(path, "llama", forms, model=model)
    read = read_gguf_model(path)
    config = dict(read.config)
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    oracle = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().double()
    oracle.load_state_dict({name: weight.load() for name, weight in read.weights.items()})
    with torch.no_grad():
        return oracle(IDS).logits


def _op_types(engine: tw.Engine) -> list[str]:
    models = [data for name, data in engine.image.files.items() if name.endswith(".onnx")]
    return [node.op_type for data in models for node in onnx.ModelProto.FromString(data).graph.node]


def test_packed_engines_have_the_numbers_of_the_file(tmp_path: Path):
    wanted = _write(tmp_path / "m.gguf", [*BLOCK_FORMS])
    largest = wanted.abs().max()
    engine = tw.compile(tmp_path / "m.gguf", verify="full", **OPTIONS)
    assert (engine(IDS).double() - wanted).abs().max() < 1e-4 * largest
    facts = engine.report()["stored_quantization"]
    assert (facts["method"], facts["linears"], facts["expanded"]) == ("gguf", 8, [])
    engine.save(tmp_path / "engine", weights="reference")
    assert torch.equal(tw.load(tmp_path / "engine")(IDS), engine(IDS))
    rounded = tw.QuantConfig("stored", compute="int8")
    engine = tw.compile(tmp_path / "m.gguf", quantize=rounded, verify="off", **OPTIONS)
    assert 1e-4 * largest < (engine(IDS).double() - wanted).abs().max() < 0.05 * largest
    assert _op_types(engine).count("MatMulNBits") == 8


def test_merged_and_permuted_projections_keep_their_codes(tmp_path: Path):
    wanted = _write(tmp_path / "m.gguf", "Q4_1")
    engine = tw.compile(tmp_path / "m.gguf", verify="off", **OPTIONS)
    assert (engine(IDS).double() - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert _op_types(engine).count("MatMulNBits") == 2 * 4 + 1


@pytest.mark.parametrize("options", [{"quantize": "expanded"}, {"backend": "eager"}])
def test_codes_can_be_expanded(tmp_path: Path, options: dict):
    wanted = _write(tmp_path / "m.gguf", "Q4_0")
    engine = tw.compile(tmp_path / "m.gguf", verify="off", **{**OPTIONS, **options})
    assert engine.report()["stored_quantization"] is None
    assert (engine(IDS).double() - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_weights_in_numbers_have_no_codes_to_keep(tmp_path: Path):
    write_tiny_gguf(tmp_path / "m.gguf", quantization="F16")
    with pytest.raises(UsageError, match=r"m\.gguf, whose weights are numbers"):
        tw.compile(tmp_path / "m.gguf", quantize="stored", **OPTIONS)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (tw.QuantConfig("stored", group=32), "nothing beside it but QuantConfig.compute"),
        (tw.QuantConfig("expanded", compute="int8"), "compute of expanded"),
        (tw.QuantConfig("stored", compute="int4"), "compute of stored"),
        ("kept", "stored, expanded"),
    ],
)
def test_options_that_mean_nothing_are_refused(config: tw.QuantConfig | str, found: str):
    with pytest.raises(UsageError, match=found):
        tw.compile("absent.gguf", quantize=config, **OPTIONS)


def test_the_verb_says_what_keeps_its_codes(tmp_path: Path):
    write_tiny_gguf(tmp_path / "m.gguf", "llama", "Q4_1")
    options = ("--scheme", "stored", "--compute", "int8", "--backend", "onnxruntime")
    common = ("--verify", "off", "--max-model-len", "64")
    done = run("quantize", tmp_path / "m.gguf", "-o", tmp_path / "engine", *options, *common)
    assert done.exit_code == 0 and "9 linears keep the codes of gguf" in done.stdout, done.output

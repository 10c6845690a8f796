"""Folders of compressed-tensors: what is in them, and who loads them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tilewright as tw
from cli_running import refused, run
from prequantized import linears, logits
from tilewright.compiler.export_quantized import export_quantized
from tilewright.errors import UnsupportedError, UsageError
from tilewright.formats.safetensors_folder import write_tensors
from tiny_models import VOCAB, tiny_model

IDS = torch.tensor([3, 50, 7, 21, 9, 12])
OPTIONS = {"backend": "eager", "max_model_len": 64, "max_batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer of characters."""
    from tokenizers import Tokenizer, models

    place = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(place)
    vocabulary = {chr(index): index for index in range(min(VOCAB, 127))}
    Tokenizer(models.BPE(vocabulary, [], unk_token="?")).save(str(place / "tokenizer.json"))
    return place


def _read(place: Path) -> tuple[dict, dict[str, Tensor]]:
    settings = json.loads((place / "config.json").read_text())["quantization_config"]
    return settings, load_file(place / "model.safetensors")


def _unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    per = 32 // bits
    numbers = words.long() & 0xFFFFFFFF
    codes = torch.stack([(numbers >> (bits * i)) & (2**bits - 1) for i in range(per)], -1)
    return codes.flatten(1)[:, :columns]


def _decoded(settings: dict, tensors: dict[str, Tensor], stem: str) -> tuple[Tensor, Tensor]:
    """A linear's weight in float64 as the format defines it, and the size of a step."""
    args = settings["config_groups"]["group_0"]["weights"]
    scale = tensors[f"{stem}.weight_scale"].double()
    packed = tensors.get(f"{stem}.weight_packed")
    if packed is None:
        codes = tensors[f"{stem}.weight"].double()
    else:
        count, width = tensors[f"{stem}.weight_shape"].tolist()
        bits = args["num_bits"]
        codes = _unpack(packed, bits, width).double() - 2 ** (bits - 1)
        if not args["symmetric"]:
            zero = _unpack(tensors[f"{stem}.weight_zero_point"].T, bits, count).T
            codes = codes - _spread(zero.double() - 2 ** (bits - 1), args, codes.shape)
    step = _spread(scale, args, codes.shape)
    return codes * step, step.expand(codes.shape)


def _spread(blocks: Tensor, args: dict, shape: torch.Size) -> Tensor:
    if args["strategy"] == "tensor":
        assert blocks.shape == (1,)
        return blocks.expand(shape)
    rows, group = args.get("block_structure") or (1, args.get("group_size") or shape[1])
    assert blocks.shape == (-(-shape[0] // rows), -(-shape[1] // group))
    wide = blocks.repeat_interleave(rows, 0).repeat_interleave(group, 1)
    return wide[: shape[0], : shape[1]]


night = partial(pytest.param, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (tw.QuantConfig("int4", group=32, symmetric=False), "pack-quantized"),
        night(tw.QuantConfig("int4", group=0), "pack-quantized"),
        night(tw.QuantConfig("int4", group=32, method="gptq", tokens=1024), "pack-quantized"),
        night(tw.QuantConfig("int8-weight"), "pack-quantized"),
        (tw.QuantConfig("int8"), "int-quantized"),
        night(tw.QuantConfig("fp8-tensor", tokens=1024), "float-quantized"),
        (tw.QuantConfig("fp8-block"), "float-quantized"),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.scheme}-{v.group}-{v.symmetric}-{v.method}",
)
def test_folders_hold_the_weights(folder: Path, tmp_path: Path, config: tw.QuantConfig, form: str):
    place = tmp_path / "out"
    facts = export_quantized(folder, place, config)
    assert (facts["format"], facts["linears"], facts["kept"]) == (form, 14, ["lm_head"])
    settings, tensors = _read(place)
    assert settings["ignore"] == ["lm_head"] and (place / "tokenizer.json").exists()
    old = tiny_model("llama")
    for name, linear in linears(old).items():
        value, step = _decoded(settings, tensors, name)
        error = (value - linear.weight.double()).abs()
        if config.method == "gptq":  # which makes up for some errors by others
            assert error.norm() < 0.25 * linear.weight.norm()
        elif form == "float-quantized":
            assert (error <= linear.weight.abs() / 16 * 1.01 + step / 512).all()
        else:
            # Half a step; scales in bfloat16 cost the ends of the range a little more.
            assert (error <= step * 0.55).all()
        linear.weight.data = value.float()
    assert torch.equal(tensors["model.embed_tokens.weight"], old.model.embed_tokens.weight)
    engine = tw.compile(place, verify="structure", **OPTIONS)
    assert engine.report()["stored_quantization"]["expanded"] == []
    wanted = logits(old, IDS)
    if settings["config_groups"]["group_0"]["input_activations"] is None:
        assert (engine(IDS) - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    "config",
    [
        tw.QuantConfig("int4", group=32),
        night(tw.QuantConfig("int8-weight")),
        tw.QuantConfig("int8"),
        tw.QuantConfig("fp8"),
        night(tw.QuantConfig("fp8-tensor", tokens=1024)),
    ],  # not fp8-block: their product takes no widths below a block's
    ids=lambda config: f"{config.scheme}-{config.symmetric}",
)
def test_transformers_loads_them(folder: Path, tmp_path: Path, config: tw.QuantConfig):
    from transformers import AutoModelForCausalLM

    export_quantized(folder, tmp_path / "out", config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    wanted = logits(theirs, IDS)
    found = tw.compile(tmp_path / "out", verify="structure", **OPTIONS)(IDS)
    # Their step of an int8 activation is the 127.5th part of the largest, ours the 127th.
    assert (found - wanted).norm() < (5e-2 if config.scheme == "int8" else 1e-5) * wanted.norm()


def test_their_reader_takes_zero_points(folder: Path, tmp_path: Path):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    export_quantized(folder, tmp_path / "out", tw.QuantConfig("int4", group=32, symmetric=False))
    settings, tensors = _read(tmp_path / "out")
    scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
    stem = "model.layers.0.mlp.down_proj"
    names = [name for name in tensors if name.startswith(f"{stem}.")]
    held = {name.removeprefix(f"{stem}."): tensors[name] for name in names}
    held["weight_scale"] = held["weight_scale"].float()
    value = PackedQuantizationCompressor.decompress(held, scheme)["weight"]
    torch.testing.assert_close(value.double(), _decoded(settings, tensors, stem)[0])


def test_large_models_are_written_by_shards(tmp_path: Path):
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate("abc")}
    assert write_tensors(tmp_path, tensors.items(), shard_bytes=32) == 48
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(tensors) and len(set(index.values())) == 2
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_the_verb_writes_a_folder(folder: Path, tmp_path: Path):
    place = tmp_path / "out"
    options = ("--scheme", "int4", "--group", 32, "--format", "compressed-tensors")
    measured = ("--report", "--tokens", 200)
    done = run("quantize", folder, "-o", place, *options, *measured, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)["quantization"]
    assert facts["linears"] == 14 and facts["quality"]["tokens"] == 199
    refused(run("quantize", place, "-o", tmp_path / "again", *options), "compressed-tensors")
    wrong = (*options[:-1], "gguf")
    refused(run("quantize", folder, "-o", tmp_path / "other", *wrong), "compressed-tensors")
    assert not (tmp_path / "again").exists() and not (tmp_path / "other").exists()


def test_what_cannot_be_written_is_refused(folder: Path, tiny_gguf: Path, tmp_path: Path):
    place = tmp_path / "out"
    for method, scheme in (("awq", "int4"), ("smoothquant", "fp8")):
        with pytest.raises(UnsupportedError, match="rtn or gptq"):
            export_quantized(folder, place, tw.QuantConfig(scheme, method=method))
    with pytest.raises(UsageError, match=r"config\.json"):
        export_quantized(tiny_gguf, place, "int4")
    with pytest.raises(UsageError, match="another folder"):
        export_quantized(folder, folder, "int4")
    tied = tmp_path / "tied"
    tiny_model("llama_tied").save_pretrained(tied)
    facts = export_quantized(tied, place, tw.QuantConfig("int8-weight", lm_head=True))
    assert "lm_head" in facts["kept"]

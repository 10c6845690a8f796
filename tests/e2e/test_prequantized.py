"""Engines of checkpoints that others quantized: their numbers, what is kept, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tilewright as tw
from prequantized import (
    Grid,
    awq_tensors,
    edit_config,
    edit_tensors,
    gptq_tensors,
    grid_of,
    logits,
    packed_tensors,
    rounding,
    write_folder,
)
from tilewright.errors import CheckpointError
from tiny_models import tiny_model

IDS = torch.tensor([3, 50, 7, 21, 9, 12])
OPTIONS = {"backend": "eager", "max_model_len": 64, "max_batch_size": 2}
E4M3 = torch.float8_e4m3fn


def _compressed(weights: dict, inputs: dict | None = None, **more: object) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


def _weights(bits: int, group: int, symmetric: bool = True, **more: object) -> dict:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        **more,
    }


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
CHANNEL8 = {**_weights(8, 0), "strategy": "channel"}
STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def _logits(folder: Path, wanted: Tensor, error: float = 1e-3, **options: object) -> dict:
    engine = tw.compile(folder, **{"verify": "structure", **OPTIONS, **options})
    found = engine(IDS).double()
    assert (found - wanted).abs().max() < error * wanted.abs().max()
    facts = engine.report()["stored_quantization"]
    assert isinstance(facts, dict)
    return facts


@pytest.mark.parametrize(("bits", "version"), [(4, 1), (8, 1), (8, 2)])
def test_gptq(tmp_path: Path, bits: int, version: int):
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": version == 2}
    settings["checkpoint_format"] = ["gptq", "gptq_v2"][version - 1]

    def quantize(name: str, linear: nn.Linear):
        grid = grid_of(linear.weight, bits, 32, version == 2)
        return gptq_tensors(grid, bits, version), grid.value

    model = write_folder(tmp_path, settings, quantize)
    facts = _logits(tmp_path, logits(model, IDS))
    assert facts["method"] == "gptq"
    assert facts["linears"] == 8 and not facts["expanded"]


@pytest.mark.parametrize("regular", [True, False])
def test_gptq_in_the_order_of_its_activations(tmp_path: Path, regular: bool):
    generator = np.random.default_rng(0)
    orders = {}

    def quantize(name: str, linear: nn.Linear):
        width = linear.in_features
        if width not in orders:
            groups = np.arange(width) // 32 if regular else generator.integers(0, 2, width)
            orders[width] = generator.permutation(groups)
        grid = grid_of(linear.weight, 4, 32, False, orders[width])
        if not regular:  # as many groups as the width says
            count = width // 32 - grid.scale.shape[1]
            grid.scale, grid.zero = (
                np.pad(part, ((0, 0), (0, count)), constant_values=1)
                for part in (grid.scale, grid.zero)
            )
        return gptq_tensors(grid, 4), grid.value

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    model = write_folder(tmp_path, settings, quantize)
    facts = _logits(tmp_path, logits(model, IDS), verify="full")
    assert facts["linears"] == (8 if regular else 0)


def _awq(folder: Path, name: str = "llama"):
    def quantize(name: str, linear: nn.Linear):
        grid = grid_of(linear.weight, 4, 32, False)
        return awq_tensors(grid), grid.value

    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    return write_folder(folder, settings, quantize, name)


def test_awq_and_its_folders(tmp_path: Path):
    model = _awq(tmp_path / "model", "qwen2")
    facts = _logits(tmp_path / "model", logits(model, IDS))
    assert facts["linears"] == 8 and not facts["expanded"]
    engine = tw.compile(tmp_path / "model", verify="off", **OPTIONS)
    for form in ("embed", "reference"):
        engine.save(tmp_path / form, weights=form)
        assert torch.equal(tw.load(tmp_path / form)(IDS), engine(IDS))


def test_stored_codes_can_be_quantized_anew(tmp_path: Path):
    model = _awq(tmp_path)
    engine = tw.compile(tmp_path, quantize="int8-weight", verify="structure", **OPTIONS)
    assert engine.report()["stored_quantization"]["linears"] == 0
    wanted = logits(model, IDS)
    assert (engine(IDS) - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, True), (4, 32, False), (8, 0, True), (8, 32, False)]
)
def test_pack_quantized(tmp_path: Path, bits: int, group: int, symmetric: bool):
    def quantize(name: str, linear: nn.Linear):
        if name.endswith("1.mlp.down_proj"):
            return {"weight": linear.weight.data}, linear.weight.data
        grid = grid_of(linear.weight, bits, group, symmetric)
        return packed_tensors(grid, bits, symmetric), grid.value

    settings = _compressed(_weights(bits, group, symmetric), format="pack-quantized")
    settings["ignore"] = ["lm_head", "re:.*1.mlp.down_proj$"]
    model = write_folder(tmp_path, settings, quantize)
    facts = _logits(tmp_path, logits(model, IDS))
    assert facts["linears"] == 7


def test_pack_quantized_by_the_order_of_activations(tmp_path: Path):
    order = np.random.default_rng(1).permutation(np.arange(96) // 32)

    def quantize(name: str, linear: nn.Linear):
        ordered = linear.in_features == 96
        grid = grid_of(linear.weight, 4, 32, True, order if ordered else None)
        index = {"weight_g_idx": torch.from_numpy(grid.groups).int()}
        return {**packed_tensors(grid, 4, True), **(index if ordered else {})}, grid.value

    settings = _compressed(_weights(4, 32, actorder="group"), format="pack-quantized")
    model = write_folder(tmp_path, settings, quantize)
    assert _logits(tmp_path, logits(model, IDS))["linears"] == 8


def _int8(name: str, linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
    grid = grid_of(linear.weight, 8, 0, True)
    codes = torch.from_numpy(grid.codes - 128).to(torch.int8)
    scale = torch.from_numpy(grid.scale).float()
    return {"weight": codes, "weight_scale": scale}, grid.value


def test_int_quantized(tmp_path: Path):
    settings = _compressed(CHANNEL8, TOKEN, format="int-quantized")
    model = write_folder(tmp_path, settings, _int8)
    rounding(model, torch.int8)
    # A step of an activation may fall to the other side: one part in 127 of one number.
    facts = _logits(tmp_path, logits(model, IDS), 5e-3, verify="full")
    assert facts["linears"] == 8 and not facts["expanded"]


@pytest.mark.parametrize("static", [False, True])
def test_float_quantized(tmp_path: Path, static: bool):
    scales: dict[str, float] = {}

    def quantize(name: str, linear: nn.Linear):
        wide = linear.weight.detach().double()
        top = wide.abs().amax() if static else wide.abs().amax(1, keepdim=True)
        scale = (top / 448).float()
        codes = (wide / scale).to(E4M3)
        made = {"weight": codes, "weight_scale": scale.reshape(-1 if static else codes.shape[0], 1)}
        if static:
            # q has a scale of its own, so that it cannot be merged with k and v.
            scales[name] = 0.02 if "q_proj" in name else 0.03
            made |= {"weight_scale": scale[None], "input_scale": torch.tensor([scales[name]])}
        return made, codes.double() * scale.double()

    weights = {"num_bits": 8, "type": "float", "symmetric": True}
    weights["strategy"] = "tensor" if static else "channel"
    inputs = STATIC if static else {**TOKEN, "type": "float"}
    settings = _compressed(weights, inputs, format="float-quantized")
    model = write_folder(tmp_path, settings, quantize)
    rounding(model, E4M3, scales if static else None)
    facts = _logits(tmp_path, logits(model, IDS), 2e-2, verify="full")
    assert facts["linears"] == (10 if static else 8)


def test_fp8_by_blocks(tmp_path: Path):
    def quantize(name: str, linear: nn.Linear):
        wide = linear.weight.detach().double()
        count, width = -(-wide.shape[0] // 32), -(-wide.shape[1] // 32)
        scale = torch.rand(count, width) * 0.001 + 0.001
        spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1).double()
        codes = (wide / spread).clamp(-448, 448).to(E4M3)
        return {"weight": codes, "weight_scale_inv": scale}, codes.double() * spread

    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    model = write_folder(tmp_path, settings, quantize)
    rounding(model, E4M3, group=32)
    facts = _logits(tmp_path, logits(model, IDS), 2e-2, verify="full")
    assert facts["linears"] == 8


@pytest.mark.parametrize(("family", "linears"), [("gpt2", 8), ("mixtral", 4)])
def test_weights_in_another_form_than_linears(tmp_path: Path, family: str, linears: int):
    """GPT-2 holds weights as [K, N]; experts lie one by one in the file, and are stacked."""
    plain, coded = tmp_path / "plain", tmp_path / "coded"
    for folder in (plain, coded):
        tiny_model(family).save_pretrained(folder)
    words = ("attn.c_", "mlp.c_", "_proj.", ".experts.")

    def decode(tensors: dict[str, Tensor], codes: bool) -> None:
        for name in [n for n in tensors if n.endswith(".weight") and any(w in n for w in words)]:
            weight = tensors.pop(name)
            grid = grid_of(weight.T if family == "gpt2" else weight, 4, 32, True)
            made = {name: grid.value.T if family == "gpt2" else grid.value}
            if codes:
                made = {f"{name[:-7]}.{k}": v for k, v in gptq_tensors(grid, 4).items()}
            tensors |= {k: v.float().contiguous() if k == name else v for k, v in made.items()}

    edit_tensors(plain, lambda tensors: decode(tensors, False))
    edit_tensors(coded, lambda tensors: decode(tensors, True))
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    edit_config(coded, quantization_config=settings)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    facts = _logits(coded, logits(model, IDS))
    assert facts["linears"] == linears
    assert all("experts" in name for name in facts["expanded"])
    assert len(facts["expanded"]) == (4 if family == "mixtral" else 0)


def test_devices_without_a_type_keep_activations(tmp_path: Path):
    from tilewright.compiler.sources import open_source

    write_folder(tmp_path, _compressed(CHANNEL8, TOKEN), _int8)
    assert open_source(tmp_path).notes == ()
    (note,) = open_source(tmp_path, computes=()).notes
    assert "no products in int8" in note


def _set(name: str, change):
    def edit(tensors: dict[str, Tensor]) -> None:
        full = f"model.layers.1.self_attn.q_proj.{name}"
        made = change(tensors[full])
        if made is None:
            del tensors[full]
        else:
            tensors[full] = made

    return edit


@pytest.fixture(scope="module")
def gptq_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gptq")

    def quantize(name: str, linear: nn.Linear):
        grid: Grid = grid_of(linear.weight, 4, 32, True)
        return gptq_tensors(grid, 4), grid.value

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    write_folder(folder, settings, quantize)
    return folder


@pytest.fixture
def damaged(gptq_folder: Path, tmp_path: Path) -> Path:
    for file in gptq_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_set("scales", lambda t: None), r"q_proj\.scales.*\[2, 64\].*no tensor of that name"),
        (_set("scales", lambda t: t[:1].clone()), r"q_proj\.scales.*\[2, 64\].*\[1, 64\]"),
        (_set("qzeros", lambda t: t[:, :4].clone()), r"q_proj\.qzeros.*\[2, 8\].*\[2, 4\]"),
        (_set("qweight", lambda t: t.float()), r"q_proj\.qweight.*int32.*float32"),
        (_set("qweight", lambda t: t[:4].clone()), r"q_proj\.scales.*\[1, 64\].*\[2, 64\]"),
        (_set("g_idx", lambda t: t + 7), r"q_proj\.g_idx.*0 … 1.*7 … 8"),
        (_set("g_idx", lambda t: t[:9].clone()), r"q_proj\.g_idx.*\[64\].*\[9\]"),
        (_set("scales", lambda t: t * float("nan")), r"q_proj\.scales.*finite"),
    ],
    ids=["lost", "groups", "zeros", "dtype", "width", "range", "length", "nan"],
)
def test_damaged_tensors_are_named(damaged: Path, edit, words: str):
    edit_tensors(damaged, edit)
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        tw.compile(damaged, verify="off", **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "hqq"}, "compressed-tensors, gptq, awq, fp8.*hqq"),
        ({"bits": 3}, r"quantization_config\.bits.*4, 8.*3"),
        ({"checkpoint_format": "marlin"}, "gptq_v2.*marlin"),
        ({"quant_method": "awq", "version": "gemv"}, "gemm.*gemv"),
        ({"quant_method": "compressed-tensors"}, "linears in codes.*none among"),
        ({"group_size": "all"}, r"group_size.*a positive integer.*'all'"),
        ({"dynamic": ["a"]}, r"dynamic.*a table"),
        ({"quant_method": "awq", "modules_to_not_convert": "lm_head"}, "a list of names"),
    ],
    ids=["method", "bits", "form", "version", "other", "group", "dynamic", "names"],
)
def test_what_cannot_be_read_is_refused(damaged: Path, changes: dict, words: str):
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    edit_config(damaged, quantization_config={**base, **changes})
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        tw.compile(damaged, verify="off", **OPTIONS)


def test_zero_biases_that_the_model_lacks_are_left_out(damaged: Path):
    def add(number: float):
        return lambda tensors: tensors.update(
            {"model.layers.0.self_attn.q_proj.bias": torch.full((64,), number)}
        )

    edit_tensors(damaged, add(0.0))
    tw.compile(damaged, verify="off", **OPTIONS)
    edit_tensors(damaged, add(1.0))
    with pytest.raises(CheckpointError, match=r"no place for model\.layers\.0\.self_attn\.q_proj"):
        tw.compile(damaged, verify="off", **OPTIONS)

"""Blocks of ggml's types taken apart: the numbers of gguf's own dequantization, block by block."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import CheckpointError, GraphError
from tilewright.formats.gguf import BLOCKS, GGUFCheckpoint, kept_codes
from tilewright.formats.gguf_model import read_gguf_model
from tilewright.formats.stored_codes import codes_of
from tilewright.formats.weight_ggml import BLOCK_FORMS
from tilewright.formats.weights import Held, apply_weight
from tiny_gguf import random_blocks, write_tensors, write_tiny_gguf


@settings(max_examples=40, deadline=None)
@given(form=st.sampled_from([*BLOCK_FORMS]), seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4))
def test_parts_give_the_numbers_of_gguf(
    tmp_path_factory: pytest.TempPathFactory, form: str, seed: int, rows: int
) -> None:
    data = random_blocks(form, rows, 2, seed)
    path = tmp_path_factory.mktemp("ggml") / "m.gguf"
    write_tensors(path, {"t": (data, form)})
    stored = kept_codes(GGUFCheckpoint(path), "t")
    assert stored is not None and codes_of(stored.weight()) == stored
    wanted = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[form]))
    found = stored.weight().load()
    # A number is the difference of two, and as near as these are to theirs.
    size = stored.scale.load().float().abs() * (40 + abs(_zero(stored)))
    room = size.repeat_interleave(BLOCK_FORMS[form].group, 1) * 2e-7
    assert found.shape == wanted.shape and bool(((found - wanted).abs() <= room).all())


def _zero(stored) -> torch.Tensor:
    return torch.zeros(()) if stored.zero is None else stored.zero.load().float()


def test_groups_of_one_number(tmp_path: Path) -> None:
    data = random_blocks("Q4_1", 1, 2, 0)
    data[0, :4] = np.array([0, 0.75], np.float16).view(np.uint8)
    data[0, 20:24] = np.array([0, 0], np.float16).view(np.uint8)
    write_tensors(tmp_path / "m.gguf", {"t": (data, "Q4_1")})
    stored = kept_codes(GGUFCheckpoint(tmp_path / "m.gguf"), "t")
    assert stored is not None
    assert stored.weight().load()[0].tolist() == [0.75] * 32 + [0.0] * 32


def test_a_model_in_codes_is_the_model_in_numbers(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", "llama", "Q4_1")
    numbers = read_gguf_model(tmp_path / "m.gguf").weights
    codes = read_gguf_model(tmp_path / "m.gguf", codes=True).weights
    assert numbers.keys() == codes.keys()
    kept = {name for name, weight in codes.items() if codes_of(weight)}
    assert kept == {name for name, weight in numbers.items() if len(weight.shape) == 2}
    for name, weight in numbers.items():
        torch.testing.assert_close(codes[name].load(), weight.load(), rtol=0, atol=1e-6)


def test_what_the_file_holds_in_numbers_stays(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", "llama", "F16")
    codes = read_gguf_model(tmp_path / "m.gguf", codes=True).weights
    assert codes == read_gguf_model(codes["model.norm.weight"].checkpoint).weights
    with pytest.raises(CheckpointError, match="output_norm"):
        GGUFCheckpoint(tmp_path / "m.gguf").tensor("output_norm.weight" + BLOCKS)


@pytest.mark.parametrize("form", ["Q4_1", "Q6_K"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_no_numbers_are_named(tmp_path: Path, form: str, value: float) -> None:
    data = random_blocks(form, 2, 2, 0)
    data[1, -2:] = np.array([value], np.float16).view(np.uint8)
    data[1, :2] = data[1, -2:]
    write_tensors(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (data, form)})
    stored = kept_codes(GGUFCheckpoint(tmp_path / "m.gguf"), "blk.0.attn_q.weight")
    assert stored is not None
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight"):
        stored.weight().load()


def test_a_file_cut_within_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_tensors(path, {"blk.0.attn_q.weight": (random_blocks("Q4_K", 64, 2, 0), "Q4_K")})
    path.write_bytes(path.read_bytes()[:-144])
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("op", "form", "width"),
    [("ggml_codes", "Q4_0", 17), ("ggml_scale", "Q3_K", 18), ("ggml_zero", "Q8_0", 34)],
)
def test_blocks_that_do_not_fit_are_refused(op: str, form: str, width: int) -> None:
    rows = Held(torch.zeros(2, width, dtype=torch.uint8), "rows")
    with pytest.raises(GraphError, match=op):
        apply_weight(op, (rows,), form=form)


def test_a_form_is_a_name() -> None:
    with pytest.raises(GraphError, match="is not a name"):
        apply_weight("ggml_codes", (Held(torch.zeros(2, 18).byte(), "rows"),), form=4)

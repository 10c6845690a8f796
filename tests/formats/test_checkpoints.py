"""Safetensors and GGUF checkpoints: lazy, exact, and never a bare exception for a damaged file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tilewright.errors import CheckpointError
from tilewright.formats import Checkpoint, LazyTensor, Stored, open_checkpoint
from tilewright.formats.gguf import SUPPORTED_TYPES, GGUFCheckpoint
from tilewright.formats.gguf_model import read_gguf_model
from tilewright.formats.gguf_tokenizer import read_gguf_tokenizer
from tilewright.formats.random import RandomCheckpoint
from tiny_gguf import finish, tiny_hf_model, write_tiny_gguf

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path, quantization="Q8_0")
    return path


TENSORS = {
    "a.weight": torch.randn(3, 4),
    "b.half": torch.randn(5).to(torch.bfloat16),
    "c.ids": torch.arange(6).reshape(2, 3),
    "d.fp8": torch.randn(4).to(torch.float8_e4m3fn),
    "e.scalar": torch.tensor(2.5),
    "f.empty": torch.empty(0, 3),
}


def test_safetensors_round_trip(tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = open_checkpoint(path)
        assert isinstance(checkpoint, Checkpoint)
        assert set(checkpoint.names()) == set(TENSORS)
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.files() == (tmp_path / "model.safetensors",)
        for name, expected in TENSORS.items():
            lazy = checkpoint.tensor(name)
            assert isinstance(lazy, LazyTensor)
            assert (lazy.shape, lazy.dtype) == (tuple(expected.shape), expected.dtype)
            loaded = Stored(checkpoint, name).load()
            flat, wanted = loaded.reshape(-1), expected.reshape(-1)
            assert torch.equal(flat.view(torch.uint8), wanted.view(torch.uint8))


def shards(folder: Path) -> dict[str, str]:
    """Two shards and their index; returns the weight map."""
    names = sorted(TENSORS)
    where = {name: f"model-0000{1 + (i >= 3)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({n: TENSORS[n] for n in names if where[n] == shard}, folder / shard)
    write_index(folder, where)
    return where


def write_index(folder: Path, where: dict[str, str]) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(text)


def test_sharded_safetensors(tmp_path: Path):
    where = shards(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == set(TENSORS)
    assert {path.name for path in checkpoint.files()} == set(where.values())
    assert torch.equal(checkpoint.tensor("a.weight").load(), TENSORS["a.weight"])
    assert torch.equal(checkpoint.tensor("e.scalar").load(), TENSORS["e.scalar"])


def test_sharded_safetensors_of_transformers(tmp_path: Path):
    model = tiny_hf_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files()) > 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.tensor(name).load(), tensor)


def test_missing_shard_is_named(tmp_path: Path):
    where = shards(tmp_path)
    (tmp_path / where["a.weight"]).unlink()
    with pytest.raises(CheckpointError, match=where["a.weight"]):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"g": "model-00001-of-00002.safetensors"}, "'g'"),
        ({"a.weight": "model-00002-of-00002.safetensors"}, "'a.weight'"),
        ({"a.weight": "../model.safetensors"}, "not beside the index"),
        ({"a.weight": 3}, "weight_map"),
    ],
)
def test_index_that_contradicts_its_shards(change: dict, found: str, tmp_path: Path):
    write_index(tmp_path, {**shards(tmp_path), **change})
    with pytest.raises(CheckpointError, match=found):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"weight_map": []}'])
def test_damaged_index(text: str, tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path)


@given(st.floats(0, 1, exclude_max=True))
def test_truncated_safetensors(tmp_path_factory: pytest.TempPathFactory, share: float):
    folder = tmp_path_factory.mktemp("st")
    save_file(TENSORS, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*download or save it again"):
        open_checkpoint(folder)
    shutil.rmtree(folder)


def test_wrong_paths(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none among config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.bin").write_text("pickle")
    with pytest.raises(CheckpointError, match="ends in .bin"):
        open_checkpoint(tmp_path / "model.bin")
    for name in ("x", "y"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files"):
        open_checkpoint(tmp_path)


def test_unknown_tensor_lists_close_ones():
    checkpoint = RandomCheckpoint({"layer.0.weight": ((2,), torch.float32)})
    with pytest.raises(CheckpointError, match=r"layer\.0\.weight"):
        checkpoint.tensor("layer.0.wieght")


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, str]]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_array("test.strings", ["a", "\u00e9", ""])
    writer.add_float64("test.double", 0.1)
    writer.add_bool("test.flag", True)
    writer.add_int64("test.negative", -5)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    finish(writer)


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_block_formats_match_gguf(kind: str, tmp_path: Path):
    quant = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[quant]
    rng, shape = np.random.default_rng(0), (6, 2, 512)
    if kind in ("F32", "F16"):
        data = rng.standard_normal(shape).astype({"F32": np.float32, "F16": np.float16}[kind])
    else:
        data = rng.integers(0, 120, (*shape[:-1], 512 // elements * size), dtype=np.uint8)
    path = tmp_path / "m.gguf"
    write_gguf(path, {"t": (data, kind), "u": (data[:1], kind)})
    checkpoint = open_checkpoint(path)
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        lazy = checkpoint.tensor(tensor.name)
        assert lazy.shape == tuple(int(n) for n in reversed(tensor.shape))
        loaded = lazy.load()
        assert (tuple(loaded.shape), loaded.dtype) == (lazy.shape, torch.float32)
        np.testing.assert_array_equal(loaded.numpy(), expected.reshape(loaded.shape))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "BF16"])
def test_tensor_larger_than_a_chunk(kind: str, tmp_path: Path):
    quant = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(1).standard_normal((700, 416)).astype(np.float32)
    data = gguf.quants.quantize(values, quant)
    write_gguf(tmp_path / "m.gguf", {"t": (data, kind)})
    loaded = open_checkpoint(tmp_path / "m.gguf").tensor("t").load().numpy()
    np.testing.assert_array_equal(loaded, gguf.quants.dequantize(data, quant))


def test_header_matches_gguf_reader(tiny_file: Path):
    checkpoint, reader = GGUFCheckpoint(tiny_file), gguf.GGUFReader(tiny_file)
    assert list(checkpoint.names()) == [tensor.name for tensor in reader.tensors]
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert checkpoint.metadata[key] == field.contents()


def test_metadata_types(tmp_path: Path):
    write_gguf(tmp_path / "m.gguf", {})
    metadata = open_checkpoint(tmp_path / "m.gguf").metadata
    assert metadata["test.numbers"] == [1, 2, 3]
    assert metadata["test.strings"] == ["a", "\u00e9", ""]
    assert metadata["test.double"] == 0.1
    assert metadata["test.flag"] is True
    assert metadata["test.negative"] == -5


def use_all(path: Path) -> None:
    """What a compile reads of a file."""
    checkpoint = GGUFCheckpoint(path)
    model = read_gguf_model(checkpoint)
    read_gguf_tokenizer(checkpoint)
    for weight in model.weights.values():
        weight.load()


@given(st.floats(0, 1, exclude_max=True))
def test_truncated_gguf(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory, share: float):
    data = tiny_file.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        GGUFCheckpoint(path)
    shutil.rmtree(path.parent)


@given(st.integers(0, 12000), st.binary(min_size=1, max_size=9))
def test_damaged_gguf_header(
    tiny_file: Path, tmp_path_factory: pytest.TempPathFactory, offset: int, noise: bytes
):
    """Any damage is either harmless or a CheckpointError; it never hangs."""
    data = bytearray(tiny_file.read_bytes())
    data[offset : offset + len(noise)] = noise
    path = tmp_path_factory.mktemp("hit") / "hit.gguf"
    path.write_bytes(data)
    try:
        use_all(path)
    except CheckpointError as error:
        assert "hit.gguf" in str(error)
    shutil.rmtree(path.parent)


def patched(tiny_file: Path, path: Path, offset: int, value: bytes) -> Path:
    data = bytearray(tiny_file.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("offset", "value", "found"),
    [
        (0, b"GGML", "begins with the bytes GGUF"),
        (4, (1).to_bytes(4, "little"), "version 1"),
        (4, (3).to_bytes(4, "big"), "big-endian"),
        (8, (2**60).to_bytes(8, "little"), "inside its header"),
        (16, (2**60).to_bytes(8, "little"), "header"),
    ],
)
def test_wrong_gguf_start(offset: int, value: bytes, found: str, tiny_file: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=found):
        GGUFCheckpoint(patched(tiny_file, tmp_path / "m.gguf", offset, value))


def test_unsupported_type_lists_the_supported(tmp_path: Path):
    data = np.zeros((2, 82 * 2), dtype=np.uint8)  # IQ2_S: 82 bytes a block of 256
    write_gguf(tmp_path / "m.gguf", {"t": (data, "IQ2_S")})
    with pytest.raises(CheckpointError, match=r"tensor 't'.*Q4_K.*type IQ2_S"):
        open_checkpoint(tmp_path / "m.gguf")


def test_split_gguf_is_refused(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    finish(writer)
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        open_checkpoint(tmp_path / "m.gguf")


def test_empty_and_unreadable_gguf(tmp_path: Path):
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match=r"empty\.gguf"):
        open_checkpoint(tmp_path / "empty.gguf")
    with pytest.raises(CheckpointError, match=r"missing\.gguf"):
        GGUFCheckpoint(tmp_path / "missing.gguf")

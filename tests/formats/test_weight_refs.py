"""weights.json: weights as expressions over a checkpoint's hashed files, or over seeds."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tilewright.errors import CheckpointError, EngineError, UsageError
from tilewright.formats import Full, Held, Random, Stored, Weight, apply_weight, open_checkpoint
from tilewright.formats.gguf_model import read_gguf_model
from tilewright.formats.random import RandomCheckpoint, parameter_weight
from tilewright.formats.weight_refs import References

pytestmark = pytest.mark.quick

TENSORS = {name: torch.randn(3, 4) for name in "abcd"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and an index, as Hugging Face saves them."""
    place = tmp_path / "model"
    place.mkdir()
    placed = {"a": "one", "b": "one", "c": "two", "d": "two"}
    for shard in ("one", "two"):
        save_file(
            {n: t for n, t in TENSORS.items() if placed[n] == shard}, place / f"{shard}.safetensors"
        )
    index = {"weight_map": {name: f"{shard}.safetensors" for name, shard in placed.items()}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


def merged(folder: Path) -> dict[str, Weight]:
    checkpoint = open_checkpoint(folder)
    a, b, c = (Stored(checkpoint, name) for name in "abc")
    tied = apply_weight("cast", (c,), dtype=torch.bfloat16)
    return {"ab": apply_weight("concat", (a, b), dim=0), "c": tied, "tied": tied}


def through_json(weights: dict[str, Weight]) -> References:
    references = References.of(weights)
    return References.from_json(json.loads(json.dumps(references.to_json())), references.held)


def test_sharded_checkpoints_come_back(folder: Path) -> None:
    references = through_json(merged(folder))
    assert references.texts["ab"] == 'concat(stored("a"), stored("b"), dim=0)'
    assert references.checkpoint is not None
    assert (references.checkpoint.kind, references.checkpoint.path) == ("safetensors", str(folder))
    assert [file.name for file in references.checkpoint.files] == [
        "one.safetensors",
        "two.safetensors",
    ]
    found = references.weights()
    assert torch.equal(found["ab"].load(), torch.cat([TENSORS["a"], TENSORS["b"]]))
    assert torch.equal(found["c"].load(), TENSORS["c"].bfloat16())
    assert found["c"] is found["tied"]
    assert References.of(found).to_json() == references.to_json()


def test_the_path_stays_as_it_was_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    references = through_json(merged(Path("model")))
    assert references.checkpoint is not None
    assert references.checkpoint.path == "model"
    assert torch.equal(references.weights()["c"].load(), TENSORS["c"].bfloat16())


@pytest.mark.parametrize("given", ["folder", "index"])
def test_a_moved_checkpoint_is_named(folder: Path, given: str) -> None:
    references = through_json(merged(folder))
    moved = folder.rename(folder.parent / "moved")
    with pytest.raises(EngineError, match=r"nothing there\. .*--checkpoint"):
        references.weights()
    place = moved if given == "folder" else moved / "model.safetensors.index.json"
    assert torch.equal(references.weights(place)["c"].load(), TENSORS["c"].bfloat16())


def test_what_changed_is_refused(folder: Path) -> None:
    references = through_json(merged(folder))
    elsewhere = shutil.copytree(folder, folder.parent / "other")
    file = elsewhere / "two.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(EngineError, match=r"two\.safetensors: expected sha256 .* when the engine"):
        references.weights(elsewhere)
    file.write_bytes(content[:-1])
    with pytest.raises(EngineError, match=r"two\.safetensors: expected \d+ bytes"):
        references.weights(elsewhere)
    file.unlink()
    with pytest.raises(EngineError, match=r"found no two\.safetensors"):
        references.weights(elsewhere)
    file.write_bytes(content)
    index = {"weight_map": {"a": "one.safetensors"}}
    (elsewhere / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EngineError, match=r"found an index of one\.safetensors"):
        references.weights(elsewhere)


def test_seeds_need_no_file(tmp_path: Path) -> None:
    weights: dict[str, Weight] = {
        "r": Random(1, (3, 2), torch.bfloat16),
        "f": Full(float("inf"), (2,)),
        "z": Full(0, (2,), torch.int32),
    }
    references = through_json(weights)
    assert references.checkpoint is None
    assert references.weights() == weights
    with pytest.raises(UsageError, match="made from seeds"):
        references.weights(tmp_path)


def test_computed_tensors_are_kept_beside_a_checkpoint(folder: Path) -> None:
    # A held tensor of the name of a stored one must not be taken for it.
    weights = {**merged(folder), "freqs": Held(torch.arange(3.0), "a")}
    references = through_json(weights)
    assert list(references.held) == ["a"]
    found = references.weights()
    assert torch.equal(found["freqs"].load(), torch.arange(3.0))
    assert torch.equal(found["ab"].load()[:3], TENSORS["a"])


def test_what_nothing_backs_can_only_be_embedded(folder: Path) -> None:
    held = Held(torch.ones(2), "w")
    cases: list[tuple[dict[str, object], str]] = [
        ({"w": held}, "'w'.*a tensor in memory"),
        ({**merged(folder), "w": held, "v": Held(torch.ones(2), "w")}, "two tensors of that name"),
        ({"w": open_checkpoint(folder).tensor("a")}, "'w'.*another engine"),
        ({**merged(folder), **merged(shutil.copytree(folder, folder / "2"))}, "'w'|checkpoint"),
        ({"w": Stored(RandomCheckpoint({"w": ((2,), torch.float32)}), "w")}, "1 of 0 files"),
    ]
    cases[3][0]["d"] = Stored(open_checkpoint(folder), "d")
    for weights, found in cases:
        with pytest.raises(UsageError, match=rf'{found}.*weights="embed"'):
            References.of(weights)


def edited(data: dict, *path: str, value: object) -> dict:
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


def test_other_texts_are_refused(folder: Path) -> None:
    data = References.of(merged(folder)).to_json()
    for text, error in (
        ("__import__('os')", EngineError),
        ('held("a")', EngineError),
        ('neg(stored("a"), stored("b"))', EngineError),
        ('stored("x")', CheckpointError),
    ):
        with pytest.raises(error):
            References.from_json(edited(data, "weights", "c", value=text), {}).weights()
    none = edited(data, "checkpoint", value=None)
    with pytest.raises(EngineError, match="a checkpoint that holds it"):
        References.from_json(none, {}).weights()
    file = {"name": "../one.safetensors", "bytes": 1, "sha256": ""}
    for path, value in (
        (("checkpoint", "kind"), "pickle"),
        (("checkpoint", "files"), []),
        (("checkpoint", "files"), [file]),
        (("weights",), []),
    ):
        with pytest.raises((TypeError, ValueError)):
            References.from_json(edited(data, *path, value=value), {})


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "expected"),
    [
        ("model.norm.weight", (4,), torch.bfloat16, 'full(1.0, (4,), "bfloat16")'),
        ("h.0.ln_1.weight", (4,), torch.float32, 'full(1.0, (4,), "float32")'),
        ("flags", (4,), torch.bool, 'full(0, (4,), "bool")'),
        ("h.0.ln_1.bias", (4,), torch.float32, "random("),
        ("norm_proj.weight", (4, 4), torch.float32, "random("),
    ],
)
def test_what_parameters_without_a_checkpoint_become(name, shape, dtype, expected) -> None:
    assert str(parameter_weight(name, shape, dtype, seed=3)).startswith(expected)


def test_random_parameters_depend_on_seed_and_name_alone() -> None:
    one, same, other, reseeded = (
        parameter_weight(name, (8, 8), torch.float32, seed)
        for name, seed in (("a", 1), ("a", 1), ("b", 1), ("a", 2))
    )
    assert one == same
    assert len({str(w) for w in (one, other, reseeded)}) == 3


@pytest.mark.parametrize(
    "text",
    [
        'full(1.0, (2,), "int8")',
        'full(300, (2,), "int8")',
        'full(2, (2,), "bool")',
        'full(nan, (2,), "float32")',
        'full(True, (2,), "float32")',
        'full("1", (2,), "float32")',
        'full(1.0, 2, "float32")',
        'full(1.0, (-2,), "float32")',
        'full(1.0, (2,), "complex64")',
        "full(1.0, (2,))",
    ],
)
def test_constants_that_are_none_are_refused(text: str) -> None:
    references = References.from_json({"checkpoint": None, "weights": {"w": text}}, {})
    with pytest.raises(EngineError, match=r"weights\.json"):
        references.weights()


def test_a_gguf_model_comes_back(smollm2_gguf: Path) -> None:
    weights = read_gguf_model(smollm2_gguf).weights
    references = through_json(dict(weights))
    assert references.checkpoint is not None
    assert (references.checkpoint.kind, references.checkpoint.path) == ("gguf", str(smollm2_gguf))
    found = references.weights(smollm2_gguf.parent)
    assert set(found) == set(weights)
    for name in ("model.norm.weight", "model.layers.3.self_attn.k_proj.weight"):
        assert torch.equal(found[name].load(), weights[name].load())

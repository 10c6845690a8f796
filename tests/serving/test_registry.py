"""The registry: each file once, names that come and go, damage that is found."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.errors import CheckpointError, TilewrightError, UsageError
from tilewright.runtime.blobs import Blobs, normal_digest
from tilewright.serving.registry.files import check_path, files_at
from tilewright.serving.registry.manifest import Preset
from tilewright.serving.registry.names import ModelName, name_of_path, parse_name
from tilewright.serving.registry.parameters import check_parameters, sampling_fields
from tilewright.serving.registry.store import Registry

pytestmark = pytest.mark.quick
ONE, TWO = ModelName("one"), ModelName("owner/two", "q4")


def sha(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(tmp_path / "models")


@pytest.fixture
def gguf(tmp_path) -> Path:
    path = tmp_path / "Tiny.Q4_K.gguf"
    path.write_bytes(b"GGUF" + b"weights" * 100)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "bert"
    (path / "1_Pooling").mkdir(parents=True)
    (path / ".cache").mkdir()
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json", ".cache/x.json"):
        (path / name).write_text(json.dumps({"of": name}))
    (path / "model.safetensors").write_bytes(b"tensors")
    (path / "pytorch_model.bin").write_bytes(b"a pickle")
    (path / "modeling.py").write_text("import os")
    return path


def test_a_file_is_held_once_and_stays_where_it_is(registry, gguf) -> None:
    manifest = registry.add(gguf, ONE)
    again = gguf.with_name("other.gguf")
    again.write_bytes(gguf.read_bytes())
    other = registry.add(again, TWO, Preset("be brief", {"temperature": 0.5}))
    assert registry.blobs.digests() == [sha(gguf.read_bytes())]
    assert (manifest.checkpoint, manifest.size) == (other.checkpoint, gguf.stat().st_size)
    assert registry.read(TWO).preset == Preset("be brief", {"temperature": 0.5})
    assert registry.names() == [ONE, TWO]
    # the same inode: nothing was copied
    assert os.path.samefile(gguf, registry.blobs.path(sha(gguf.read_bytes())))
    path = registry.path(manifest)
    assert path.name == gguf.name and path.read_bytes() == gguf.read_bytes()
    assert registry.path(other).name == "other.gguf"


def test_where_links_cannot_be_it_is_a_copy(registry, gguf, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr("tilewright.runtime.blobs.os.link", refuse)
    manifest = registry.add(gguf, ONE)
    assert not os.path.samefile(gguf, registry.path(manifest))
    gguf.write_bytes(b"GGUF, but another")
    registry.verify(manifest)


def test_a_folder_is_its_weights_and_configuration(registry, folder) -> None:
    manifest = registry.add(folder, ONE)
    names = [file.path for file in manifest.files]
    assert names == ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    path = registry.path(manifest)
    assert path.name == "bert"
    assert {name: (path / name).read_bytes() for name in names} == {
        name: (folder / name).read_bytes() for name in names
    }
    assert registry.path(manifest) == path


def test_blobs_go_with_the_last_name(registry, gguf, folder) -> None:
    registry.add(gguf, ONE)
    registry.copy(ONE, TWO)
    assert registry.read(ONE).digest == registry.read(TWO).digest
    registry.add(folder, ModelName("bert"))
    held = len(registry.blobs.digests())
    assert registry.remove(ONE) == 0 and len(registry.blobs.digests()) == held
    assert registry.remove(TWO) == gguf.stat().st_size
    assert len(registry.blobs.digests()) == held - 1 and gguf.exists()
    with pytest.raises(UsageError, match=r"'two'.*registered: bert"):
        registry.remove(parse_name("two"))
    with pytest.raises(UsageError, match="Did you mean 'bert'"):
        registry.copy(parse_name("bart"), ONE)


def test_a_name_that_is_taken_goes_to_the_new_model(registry, gguf, folder) -> None:
    registry.add(gguf, ONE)
    registry.add(folder, ONE)
    assert registry.read(ONE).kind == "folder" and registry.names() == [ONE]
    assert registry.prune() == gguf.stat().st_size
    registry.verify(registry.read(ONE))


def test_damage_is_found(registry, gguf) -> None:
    manifest = registry.add(gguf, ONE)
    content = gguf.read_bytes()
    gguf.write_bytes(content[:-1] + b"!")  # in place: the blob is the same file
    with pytest.raises(CheckpointError, match=f"expected .*{sha(content)}, found sha256:.* again"):
        registry.verify(manifest)
    with pytest.raises(CheckpointError, match="found sha256:"):
        registry.path(manifest)
    gguf.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"found {len(content) - 1} bytes"):
        registry.path(manifest)
    whole = gguf.with_name("whole.gguf")
    whole.write_bytes(content)
    registry.add(whole, TWO)
    assert registry.path(manifest).read_bytes() == content
    registry.blobs.path(sha(content)).unlink()
    with pytest.raises(CheckpointError, match="found nothing there"):
        registry.path(manifest)


def test_a_damaged_manifest_says_so_and_loses_nothing(registry, gguf, tmp_path) -> None:
    registry.add(gguf, ONE)
    registry.copy(ONE, TWO)
    (file,) = (tmp_path / "models" / "manifests").glob("one=*")
    text = file.read_text()
    for damaged in (text.replace('"system": null', '"system": "x"'), text[:-9], "[]", ""):
        file.write_text(damaged)
        with pytest.raises(CheckpointError, match="one=latest.json"):
            registry.read(ONE)
    entries = {entry.name: entry for entry in registry.entries()}
    assert entries[ONE].manifest is None and "one=latest.json" in entries[ONE].damage
    assert entries[TWO].manifest is not None
    # What it referred to is not known, so nothing is thought to be free.
    assert registry.remove(TWO) == 0 and registry.prune() == 0
    assert registry.remove(ONE) == 0
    assert registry.prune() == gguf.stat().st_size


def test_what_is_made_of_blobs(registry, gguf) -> None:
    content = gguf.read_bytes()
    with pytest.raises(CheckpointError, match="expected one that has been sent"):
        registry.create(ONE, {"tiny.gguf": sha(content)}, Preset())
    with registry.blobs.receiving(sha(content)) as file:
        file.write(content)
    manifest = registry.create(ONE, {"tiny.gguf": sha(content)}, Preset("hello"))
    assert registry.path(manifest).name == "tiny.gguf"
    assert registry.read(ONE).preset.system == "hello"
    derived = registry.derive(TWO, ONE, Preset(None, {"top_k": 3}), "int8-weight")
    assert derived.preset == Preset("hello", {"top_k": 3})
    assert derived.checkpoint != manifest.checkpoint  # compiled otherwise
    with pytest.raises(UsageError, match=r"one \.gguf file"):
        registry.create(ONE, {"config.json": sha(content)}, Preset())


def test_other_bytes_than_the_digest_says_leave_nothing(registry, tmp_path) -> None:
    digest = sha(b"right")
    with pytest.raises(CheckpointError, match=f"the bytes of {digest}, found those of"):  # noqa: SIM117
        with registry.blobs.receiving(digest) as file:
            file.write(b"wrong")
    with pytest.raises(KeyboardInterrupt), registry.blobs.receiving(digest) as file:
        file.write(b"right")
        raise KeyboardInterrupt
    assert digest not in registry.blobs
    assert [path for path in (tmp_path / "models").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", ":tag", "a:", "a:b:c", "../x", "..", ".", "/etc/passwd", "a/../b", "a//b"),
        *("a\0b", "a\n", "a b", "-a", ".a", "a/.b", "a\\b", "C:\\x", "a/b/c/d", "x" * 81),
        *("ü", "a:../b", "a+b", "a=b", "/".join(["x" * 70] * 3)),
    ],
)
def test_names_that_are_none(text) -> None:
    with pytest.raises(UsageError, match="model name"):
        parse_name(text)


def test_names() -> None:
    assert parse_name("SmolLM2:Q4_K") == parse_name("smollm2:q4_k") == ModelName("smollm2", "q4_k")
    assert str(parse_name("a")) == "a:latest" and parse_name("a:latest").short == "a"
    assert parse_name("owner/two:q4") == TWO
    assert name_of_path("My Model (1)") == ModelName("my-model-1")


@given(st.text(max_size=30))
def test_no_name_leads_out_of_the_registry(text) -> None:
    registry = Registry(Path("models"))
    try:
        name = parse_name(text)
    except UsageError:
        return
    file = Path(os.path.normpath(registry._file(name)))
    assert file.parent == Path("models/manifests")
    assert parse_name(str(name)) == name


@pytest.mark.parametrize(
    "path", ["", "..", "../x", "/x", "a/../b", "a//b", "a\0b", "a/b/c/d", ".x"]
)
def test_paths_that_are_none(path) -> None:
    with pytest.raises(UsageError, match="file name"):
        check_path(path)


@pytest.mark.parametrize(
    "text", ["", "sha256:12", "../../x", "sha256:" + "g" * 64, "md5:" + "0" * 64]
)
def test_digests_that_are_none(registry, text) -> None:
    with pytest.raises(UsageError, match="digest"):
        registry.blobs.path(text)
    assert normal_digest("sha256-" + "AB" * 32) == "sha256:" + "ab" * 32


def test_what_is_no_model(registry, tmp_path, folder) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    (folder / "model.safetensors").unlink()
    for name, words in (("notes.txt", "notes.txt"), ("empty", "none"), ("bert", "safetensors")):
        with pytest.raises(UsageError, match=words):
            files_at(tmp_path / name)
    with pytest.raises(CheckpointError, match="nothing there"):
        registry.add(tmp_path / "nowhere", ONE)
    assert registry.names() == []


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"temprature": 1}, "Write 'temperature'"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "a number"),
        ({"top_k": 1.5}, "a whole number"),
        ({"seed": True}, "a whole number"),
        ({"stop": [1]}, "a list of texts"),
        ({"stop": ["x" * 1025]}, "the longest of 1025"),
        ({"stop": ["x"] * 65}, "up to 64 texts"),
        ({"num_ctx": 0}, "from 1 to"),
        ({"repeat_penalty": 5e-324}, "from 0.01 to 100"),
        ({"temperature": float("inf")}, "from 0 to 100"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_parameters_that_are_none(registry, gguf, given_, words) -> None:
    with pytest.raises(UsageError, match=words):
        registry.add(gguf, ONE, Preset(None, given_))
    assert registry.names() == []


def test_parameters() -> None:
    assert check_parameters({"stop": "x", "num_ctx": 99}) == {"stop": ["x"], "num_ctx": 99}
    assert sampling_fields({"num_predict": -1, "num_ctx": 9, "repeat_penalty": 1.1}) == {
        "repetition_penalty": 1.1
    }


def test_what_a_check_refuses_gets_no_name(tmp_path, gguf) -> None:
    def check(path: Path, quantize: str | None) -> None:
        raise UsageError(str(path), expected="good", found=f"{quantize}", remedy="No.")

    registry = Registry(tmp_path / "models", check)
    with pytest.raises(UsageError, match="found int9"):
        registry.add(gguf, ONE, quantize="int9")
    assert registry.names() == []


def _add_and_remove(folder: Path, gguf: Path, own: str, rounds: int) -> None:
    registry = Registry(folder)
    name = parse_name(own)
    for _ in range(rounds):
        manifest = registry.add(gguf, name)
        registry.verify(manifest)  # while it has its name, its blob is there
        assert registry.read(name) == manifest
        registry.remove(name)


def test_two_processes_at_once(tmp_path, gguf) -> None:
    context = multiprocessing.get_context("fork")
    arguments = [(tmp_path / "models", gguf, own, 25) for own in ("one", "two")]
    both = [context.Process(target=_add_and_remove, args=args) for args in arguments]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    registry = Registry(tmp_path / "models")
    assert registry.names() == [] and registry.blobs.digests() == []


def test_a_place_that_cannot_be_written_is_said(tmp_path, gguf) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    for attempt in (
        lambda: Registry(tmp_path / "models").add(gguf, ONE),
        lambda: Blobs(tmp_path / "models").take(gguf),
    ):
        with pytest.raises(TilewrightError, match=r"room to write to.*TILEWRIGHT_CACHE"):
            attempt()

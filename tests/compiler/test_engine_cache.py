"""Which engine of the cache a model has: none but its own, and none that is damaged."""

from __future__ import annotations

import os

import pytest

from tilewright.compiler import engine_cache
from tilewright.compiler.engine_cache import cached_engine, engine_key, keep_engine
from tilewright.compiler.options import resolve_options
from tilewright.errors import EngineError

DEFAULTS = {
    "target": "cpu",
    "backend": "eager",
    "kv_cache": "auto",
    "dtype": "auto",
    "max_model_len": None,
    "max_batch_size": None,
    "verify": "off",
    "trust_remote_code": False,
}


def options(**changes: object):
    return resolve_options(**{**DEFAULTS, **changes})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "onnxruntime"},
        {"target": "h100", "backend": "triton"},
        {"kv_cache": "static"},
        {"dtype": "bfloat16"},
        {"max_model_len": 64},
        {"max_batch_size": 3},
        {"memory_fraction": 0.5},
        {"quantize": "int8-weight"},
        {"attention": "mqa"},
        {"tune": "none"},
    ],
)
def test_another_option_is_another_engine(model, change) -> None:
    assert engine_key(model, options()) == engine_key(model, options())
    assert engine_key(model, options(**change)) != engine_key(model, options())


def test_other_files_code_or_records_are_another_engine(model, tmp_path, monkeypatch) -> None:
    keys = [engine_key(model, options())]
    os.utime(model, ns=(1, 1))
    keys.append(engine_key(model, options()))
    model.write_bytes(b"GGUF, and more")
    keys.append(engine_key(model, options()))
    (tmp_path / "cache" / "tuning.jsonl").write_text("{}\n")
    keys.append(engine_key(model, options()))
    monkeypatch.setattr(engine_cache, "code_digest", lambda: "another release")
    keys.append(engine_key(model, options()))
    monkeypatch.setattr(engine_cache.metadata, "version", lambda package: "another version")
    keys.append(engine_key(model, options()))
    assert len(set(keys)) == len(keys) and None not in keys
    folder = tmp_path / "folder"
    folder.mkdir()
    before = engine_key(folder, options())
    (folder / "config.json").write_text("{}")
    assert engine_key(folder, options()) != before


@pytest.mark.parametrize(
    ("switch", "value"),
    [("TILEWRIGHT_DEBUG", "1"), ("TILEWRIGHT_DUMP", "x"), ("TILEWRIGHT_PASS_LIMIT", "3")],
)
def test_who_watches_the_compiler_sees_it_work(model, monkeypatch, switch, value) -> None:
    monkeypatch.setenv(switch, value)
    assert engine_key(model, options()) is None


def test_what_a_key_cannot_say_is_not_kept(model) -> None:
    assert engine_key(model, options(trust_remote_code=True)) is None
    assert engine_key(model, options(random_weights=1)) is None
    assert cached_engine(None, model) is None and not keep_engine(None, None)


def test_a_damaged_entry_is_none(model, tmp_path) -> None:
    key = engine_key(model, options())
    assert cached_engine(key, model) is None
    entry = tmp_path / "cache" / "engines" / key
    entry.mkdir(parents=True)
    (entry / "manifest.json").write_text("{}")
    assert cached_engine(key, model) is None


def test_the_oldest_make_room_and_a_full_disk_is_no_error(model, tmp_path, monkeypatch) -> None:
    key = engine_key(model, options())

    def save(image: object, folder, weights: str) -> None:
        folder.mkdir(parents=True)

    monkeypatch.setattr("tilewright.runtime.folder.save_engine", save)
    entries = tmp_path / "cache" / "engines"
    for age in range(engine_cache.MOST_ENTRIES):
        (entries / str(age)).mkdir(parents=True)
        os.utime(entries / str(age), (age + 1, age + 1))
    assert keep_engine(key, None)
    assert len(list(entries.iterdir())) == engine_cache.MOST_ENTRIES
    assert (entries / key).exists() and not (entries / "0").exists()

    def fail(*_: object) -> None:
        raise EngineError("x", expected="room", found="none", remedy="Free space.")

    monkeypatch.setattr("tilewright.runtime.folder.save_engine", fail)
    assert not keep_engine(key, None)

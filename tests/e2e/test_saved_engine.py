"""Engine folders: the same answers without the compiler, every byte accounted for."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tilewright as tw
from e2e.conftest import CHAT
from tilewright.errors import EngineError

PARAMS = tw.SamplingParams(max_new_tokens=16, ignore_eos=True, logprobs=2)

# Loads an engine where compiling is impossible, and prints what it generates. Then it audits a
# second load for anything that runs code. (Graph text goes through ast.parse, which only makes a
# tree; that is a "compile" event, so those are not counted.)
ALONE = """
import importlib.abc, json, sys
BLOCKED = ("transformers", "tilewright.compiler", "tilewright.passes")
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in BLOCKED):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import torch
def export(*args, **kwargs):
    raise AssertionError("torch.export.export was called")
torch.export.export = export
import tilewright as tw
engine = tw.load(sys.argv[1])
params = tw.SamplingParams(max_new_tokens=16, ignore_eos=True, logprobs=2)
found = engine.generate([sys.argv[2], sys.argv[2] * 3], params)
ids = engine.tokenizer.encode(sys.argv[2])
logits = engine(torch.tensor(ids)).tolist()
seen = []
watched = {"exec", "import", "pickle.find_class", "subprocess.Popen", "os.system"}
active = True
def audit(event, args):
    if active and event in watched:
        seen.append((event, str(args)[:200]))
sys.addaudithook(audit)
tw.load(sys.argv[1])
active = False
print(json.dumps({
    "seen": seen,
    "tokens": [c.token_ids for c in found], "texts": [c.text for c in found],
    "logits": logits,
    "loaded": sorted(m for m in sys.modules if m.startswith(BLOCKED)),
}))
"""


@pytest.fixture(scope="module")
def alone(saved_lm) -> dict[str, object]:
    """What a process of its own finds in the folder."""
    command = [sys.executable, "-c", ALONE, str(saved_lm), CHAT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_same_answers_where_nothing_can_be_compiled(lm_engine, alone) -> None:
    assert alone["loaded"] == []
    expected = lm_engine.generate([CHAT, CHAT * 3], PARAMS)
    assert alone["tokens"] == [completion.token_ids for completion in expected]
    assert alone["texts"] == [completion.text for completion in expected]
    logits = lm_engine(torch.tensor(lm_engine.tokenizer.encode(CHAT)))
    torch.testing.assert_close(torch.tensor(alone["logits"]), logits, atol=1e-6, rtol=0)


def test_loading_runs_no_code_of_the_folder(alone) -> None:
    assert alone["seen"] == []


def test_a_folder_holds_only_text_and_tensors(saved_lm) -> None:
    endings = {path.suffix for path in saved_lm.rglob("*") if path.is_file()}
    assert endings <= {".json", ".txt", ".safetensors", ".onnx"}


def test_a_module_engine_is_the_same_after_loading(mlp_engine, tmp_path) -> None:
    mlp_engine.save(tmp_path / "mlp")
    loaded = tw.load(tmp_path / "mlp")
    x = torch.randn(7, 20)
    for found, expected in zip(loaded(x), mlp_engine(x), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(tw.errors.UsageError, match="from 1 to 64"):
        loaded(torch.randn(65, 20))
    assert loaded.report() == mlp_engine.report()


def test_a_loaded_engine_saves_the_same_folder_again(saved_lm, tmp_path) -> None:
    tw.load(saved_lm).save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved_lm)
    mine = tmp_path / "again"
    tw.load(mine).save(mine)
    assert contents(mine) == contents(saved_lm)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def copy(saved_lm, tmp_path) -> Path:
    return shutil.copytree(saved_lm, tmp_path / "copy")


def test_a_flipped_byte_in_any_file_is_found(saved_lm, copy) -> None:
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(EngineError) as raised:
            tw.load(copy)
        assert path.name in str(raised.value)
        path.write_bytes(whole)
    tw.load(copy)


def test_a_missing_file_is_found(copy) -> None:
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(EngineError) as raised:
            tw.load(copy)
        assert path.name in str(raised.value)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["extra.json", "graphs/999-evil.txt", "weights/x.safetensors"])
def test_an_added_file_is_found(copy, name: str) -> None:
    (copy / name).write_text("{}")
    with pytest.raises(EngineError, match=Path(name).name):
        tw.load(copy)


def rewrite_manifest(folder: Path, **changes: object) -> None:
    """Changes the manifest as somebody would who can compute its digest too."""
    from tilewright.runtime.folder import _digest

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("self")
    manifest.update(changes)
    manifest["self"] = _digest(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "engine format 2, found format 99"),
        ({"target": "h100"}, "h100"),
        ({"target": "no-such-device"}, "no-such-device"),
        ({"backend": 7, "lm": 3}, ""),
        ({"lm": {"vocab_size": "many"}}, "Compile the model again"),
        ({"lm": None, "signature": None}, ""),
        ({"artifacts": ["../secret"]}, "secret"),
        ({"artifacts": 3}, "Compile the model again"),
        ({"files": []}, ""),
    ],
)
def test_a_manifest_of_something_else_is_refused(copy, changes, message: str) -> None:
    rewrite_manifest(copy, **changes)
    with pytest.raises(tw.errors.TilewrightError) as raised:
        tw.load(copy)
    assert message in str(raised.value)


def test_an_edited_manifest_is_refused(copy) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"max_batch_size": 8', '"max_batch_size": 9'))
    with pytest.raises(EngineError, match=r"manifest\.json"):
        tw.load(copy)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"format": 2}', "\0" * 20])
def test_a_manifest_that_is_none_is_refused(copy, content: str) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(EngineError, match=r"manifest\.json"):
        tw.load(copy)


def test_what_is_no_engine_is_refused(tmp_path, tiny_gguf) -> None:
    for path in (tmp_path / "nothing", tmp_path, tiny_gguf):
        with pytest.raises(EngineError, match="tilewright compile"):
            tw.load(path)


WRITERS = (
    (Path, "write_text"),
    (Path, "write_bytes"),
    (safetensors.torch, "save_file"),
    ("os", "fsync"),
    ("os", "rename"),
)


class FullDisk:
    """Makes the n-th write of any kind fail as a full disk does, half way through a file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
        self.left = fails_at
        for owner, name in WRITERS:
            if owner == "os":
                import os as owner
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name), name))

    def _wrap(self, write, name: str):
        def wrapped(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                if name == "write_bytes":
                    write(args[0], args[1][: len(args[1]) // 2])
                if name == "save_file":
                    raise safetensors.SafetensorError("No space left on device (os error 28)")
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*args, **kwargs)

        return wrapped


def test_a_full_disk_leaves_the_old_engine(mlp_engine, tmp_path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = home / "engine"
    mlp_engine.save(path)
    before = contents(path)
    failures = 0
    for fails_at in range(1, 200):
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, fails_at)
            try:
                mlp_engine.save(path)
            except EngineError as error:
                failures += 1
                assert "untouched" in str(error)
            if disk.left > 0:
                break
        assert contents(path) == before
        assert [p.name for p in home.iterdir()] == ["engine"]
        tw.load(path)
    assert failures > 10


def test_a_full_disk_leaves_nothing_where_nothing_was(mlp_engine, tmp_path) -> None:
    for fails_at in (1, 4, 9):
        with pytest.MonkeyPatch.context() as patch:
            FullDisk(patch, fails_at)
            with pytest.raises(EngineError, match="No space left"):
                mlp_engine.save(tmp_path / "engine")
        assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_the_old_engine(mlp_engine, tmp_path, monkeypatch) -> None:
    path = tmp_path / "engine"
    mlp_engine.save(path)
    before = contents(path)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mlp_engine.save(path)
    assert contents(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_saves_at_once_leave_one_whole_engine(mlp_engine, tmp_path) -> None:
    path = tmp_path / "engine"
    errors = []

    def save() -> None:
        try:
            for _ in range(4):
                mlp_engine.save(path)
        except Exception as error:  # shown below
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    tw.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_a_file_in_the_way_is_not_overwritten(mlp_engine, tmp_path) -> None:
    (tmp_path / "engine").write_text("mine")
    with pytest.raises(tw.errors.UsageError, match="a folder, or nothing yet"):
        mlp_engine.save(tmp_path / "engine")
    assert (tmp_path / "engine").read_text() == "mine"

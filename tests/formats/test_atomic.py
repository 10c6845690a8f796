"""Files and folders appear whole or not at all, whatever fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tilewright.errors import UsageError
from tilewright.formats import atomic
from tilewright.formats.atomic import atomic_folder, write_atomic
from tilewright.formats.hashing import sha256_file

pytestmark = pytest.mark.quick


def full_disk(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def listing(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("content", ["text\r\n\u00e9", b"\x00\xff"])
def test_write_replaces_the_whole_file(content: str | bytes, tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("something much longer than the new content")
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_write_keeps_the_old_file_on_a_full_disk(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_atomic(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a.txt", "new")
    assert listing(tmp_path) == {"a.txt": "old"}


@pytest.mark.parametrize("exchange", [True, False])
def test_folder_replaces_the_old_one(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    target = tmp_path / "deep" / "engine"
    for name in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / name).write_text(name)
            assert not (target / "sub" / name).exists()
    assert listing(tmp_path) == {"deep/engine/sub/new": "new"}
    assert [p.name for p in target.parent.iterdir()] == ["engine"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()]
)
@pytest.mark.parametrize("existed", [True, False])
def test_failure_inside_leaves_everything_as_it_was(
    error: BaseException, existed: bool, tmp_path: Path
):
    target = tmp_path / "engine"
    if existed:
        target.mkdir()
        (target / "old").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(type(error)), atomic_folder(target) as folder:
        (folder / "half").write_text("half")
        raise error
    assert listing(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["engine"] if existed else [])


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_full_disk_while_finishing(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "engine"
    target.mkdir()
    (target / "old").write_text("old")
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    with pytest.raises(OSError, match="No space"), atomic_folder(target) as folder:
        (folder / "new").write_text("new")
        monkeypatch.setattr(os, failing, full_disk)
    monkeypatch.undo()
    assert listing(tmp_path) == {"engine/old": "old"}


def test_second_rename_fails_and_the_old_folder_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "engine"
    target.mkdir()
    (target / "old").write_text("old")
    rename = os.rename

    def once_full(source: Path, destination: Path) -> None:
        if Path(destination) == target and Path(source).suffix == ".tmp":
            full_disk()
        rename(source, destination)

    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", once_full)
    with pytest.raises(OSError, match="No space"), atomic_folder(target) as folder:
        (folder / "new").write_text("new")
    assert listing(tmp_path) == {"engine/old": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_folder_where_a_file_is(tmp_path: Path):
    (tmp_path / "engine").write_text("a file")
    with pytest.raises(UsageError, match="found a file"), atomic_folder(tmp_path / "engine"):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == {"engine": "a file"}


def test_modes_follow_the_umask(tmp_path: Path):
    with atomic_folder(tmp_path / "engine") as folder:
        (folder / "a").write_text("")
    write_atomic(tmp_path / "b", "")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "c").write_text("")
    assert (tmp_path / "engine").stat().st_mode == plain.stat().st_mode
    assert (tmp_path / "b").stat().st_mode == (plain / "c").stat().st_mode


def test_sha256(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == expected


def test_a_folder_that_somebody_else_puts_there_first_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "engine"
    there = Path.exists

    def exists(self: Path, **options: bool) -> bool:
        found = there(self, **options)
        if self == path and not found and there(tmp_path / "other"):
            os.rename(tmp_path / "other", path)  # between the look and the rename
        return found

    with atomic_folder(path) as folder:
        (folder / "new").write_text("new")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "theirs").write_text("theirs")
        monkeypatch.setattr(Path, "exists", exists)
    monkeypatch.undo()
    assert listing(tmp_path) == {"engine/new": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]

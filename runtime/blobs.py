"""Files by their content: each is held once, under its SHA-256, whoever refers to it.

Two processes may write the same blob at once: both write the same bytes, beside their place, and
rename. What is never done here is to remove a blob that somebody refers to: that is the caller's,
who knows the references, under `locked`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError, UsageError
from ..formats.atomic import write_atomic
from ..formats.hashing import sha256_file

_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True)
class Blob:
    """A file that is held: its digest, "sha256:" and 64 hexadecimal digits, and its bytes."""

    digest: str
    size: int


class Blobs:
    """A folder of blobs.

    Args:
        folder: made when something is first written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checked = folder / "checked"

    def path(self, digest: str) -> Path:
        """Where a blob is, or would be.

        Raises:
            UsageError: no digest, but something else.
        """
        return self._folder / normal_digest(digest).replace(":", "-")

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def take(self, source: Path) -> Blob:
        """Holds a file: by a hard link where the file system allows, else by a copy. The file
        stays where it is, and may be removed; but what writes into it in place damages a link,
        which `check` finds.

        Raises:
            CheckpointError: the file cannot be read, or changes meanwhile.
            UsageError: there is no room for it.
        """
        try:
            source = source.resolve(strict=True)
            before = _facts(source)
            digest = f"sha256:{sha256_file(source)}"
        except OSError as error:
            raise CheckpointError(
                str(source),
                expected="a file that can be read",
                found=error.strerror or str(error),
                remedy="Check the path and its permissions.",
            ) from error
        if not self._sound(digest):
            with self._placed(digest) as temporary:
                _link_or_copy(source, temporary)
                _refuse_change(source, before, _facts(source))
                if _facts(temporary) != before:  # a copy, which is another file
                    _refuse_change(source, digest, f"sha256:{sha256_file(temporary)}")
        self._remember(digest)
        return Blob(digest, before[1])

    @contextmanager
    def receiving(self, digest: str) -> Iterator[BinaryIO]:
        """A file to write a blob to, which is held when the block ends without an error.

        Raises:
            CheckpointError: other bytes than its digest says; nothing of them is left.
            UsageError: there is no room, or no digest.
        """
        wanted = normal_digest(digest)
        with self._placed(wanted) as temporary:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if (found := f"sha256:{sha256_file(temporary)}") != wanted:
                raise CheckpointError(
                    "the body",
                    expected=f"the bytes of {wanted}",
                    found=f"those of {found}",
                    remedy="Send the file again; nothing of it was kept.",
                )
        self._remember(wanted)

    def check(self, blob: Blob, *, whole: bool = False) -> None:
        """Sees that a blob is what it says.

        Args:
            blob: which.
            whole: hashes it, as else is done only where its size or time is another than when it
                was last hashed.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path, remedy = self.path(blob.digest), "Add the model again: tilewright models add PATH."
        expected = f"{blob.size} bytes of {blob.digest}"
        if not path.is_file():
            raise CheckpointError(
                f"blob {path}", expected=expected, found="nothing there", remedy=remedy
            )
        if (size := path.stat().st_size) != blob.size:
            raise CheckpointError(
                f"blob {path}", expected=expected, found=f"{size} bytes", remedy=remedy
            )
        if not whole and self._unchanged(blob.digest):
            return
        if (found := f"sha256:{sha256_file(path)}") != blob.digest:
            raise CheckpointError(f"blob {path}", expected=expected, found=found, remedy=remedy)
        self._remember(blob.digest)

    def remove(self, digest: str) -> int:
        """Removes a blob; its bytes, 0 where there was none. To be called under `locked`."""
        path = self.path(digest)
        (self._checked / path.name).unlink(missing_ok=True)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        return size

    def digests(self) -> list[str]:
        """Of every blob that is held."""
        names = (path.name for path in self._folder.glob("sha256-*"))
        return sorted(name.replace("-", ":", 1) for name in names if _DIGEST.fullmatch(name))

    def sweep(self) -> None:
        """Removes what a process that was killed left half written: a day later, as one that
        lives may be writing still.
        """
        for path in self._folder.glob(".new-*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - 86400:
                    shutil.rmtree(path, ignore_errors=True)

    def _sound(self, digest: str) -> bool:
        path = self.path(digest)
        if not path.is_file():
            return False
        return self._unchanged(digest) or f"sha256:{sha256_file(path)}" == digest

    def _unchanged(self, digest: str) -> bool:
        """Whether the file is the one that was hashed, by its size and times."""
        path = self.path(digest)
        try:
            known = json.loads((self._checked / path.name).read_text("utf-8"))
        except (OSError, ValueError):  # absent or damaged: it is hashed again
            return False
        return bool(known == list(_facts(path)))

    def _remember(self, digest: str) -> None:
        path = self.path(digest)
        with contextlib.suppress(OSError):  # it is hashed again, then
            self._checked.mkdir(parents=True, exist_ok=True)
            write_atomic(self._checked / path.name, json.dumps(_facts(path)))

    @contextmanager
    def _placed(self, digest: str) -> Iterator[Path]:
        """A place to write to, renamed to the blob's when the block ends without an error."""
        path = self.path(digest)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=self._folder) as beside:
                yield Path(beside, path.name)
                os.replace(Path(beside, path.name), path)
        except OSError as error:
            raise _unwritable(self._folder, error) from error


def normal_digest(text: str) -> str:
    """A digest in the one form that is kept: "sha256:" and 64 lower-case digits.

    Raises:
        UsageError: something else, which might be a path.
    """
    found = _DIGEST.fullmatch(text)
    if found is None:
        raise UsageError(
            "digest",
            expected="'sha256:' and 64 hexadecimal digits",
            found=repr(text[:80]),
            remedy="Hash the file with SHA-256.",
        )
    return f"sha256:{found[1].lower()}"


def digest_of(content: bytes) -> str:
    """The digest of bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def write_document(path: Path, text: str) -> None:
    """Writes a small file whole or not at all, and makes its folder.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        str(path),
        expected="a place with room to write to",
        found=error.strerror or str(error),
        remedy="Free space, or set TILEWRIGHT_CACHE to another folder.",
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, waiting until other processes and threads have let it go.

    Raises:
        UsageError: the file cannot be written.
    """
    import fcntl  # not everywhere; to import this module must work without

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _facts(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _refuse_change(source: Path, before: object, after: object) -> None:
    if before != after:
        raise CheckpointError(
            str(source),
            expected="a file that stays as it is while it is added",
            found="one that is being written",
            remedy="Add it again when it is whole.",
        )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, one without links, or somebody else's file
        shutil.copyfile(source, target)

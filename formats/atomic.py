"""Files and folders that appear whole or not at all.

Everything is written beside its destination under a temporary name, flushed to the disk, and then
renamed. Whatever goes wrong before the rename (a full disk, Ctrl-C, an error of the caller) leaves
the destination as it was and no temporary file behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import UsageError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Args:
        path: the file; its folder must exist.
        content: bytes, or text that is written as UTF-8 without changing its line ends.

    Raises:
        OSError: the file cannot be written; the old one is untouched.
    """
    with atomic_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Give a new file to write to; on leaving, it takes the place of `path` in one step.

    A file that is there already stays as it was if the block raises anything.

    Raises:
        OSError: the file cannot be written; the old one is untouched.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(0o666))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a new empty folder to fill; on leaving, it takes the place of `path` in one step.

    A folder that is there already is replaced as a whole, and stays as it was if the block raises
    anything, KeyboardInterrupt included.

    Args:
        path: the folder to make; missing parents are made too.

    Raises:
        UsageError: `path` is there and is no folder.
        OSError: the disk is full or the place not writable; the old folder is untouched.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UsageError(
            str(path),
            expected="a folder, or nothing yet",
            found="a file",
            remedy="Choose another place to write to.",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, _mode(0o777))
        for folder, _, files in os.walk(temporary):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        _replace_folder(temporary, path)
    finally:
        # after an exchange the old folder stands here; after a plain rename nothing does
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(path.parent)


def _replace_folder(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`; what was there is then at `new`."""
    if _took_free_place(new, path):
        return
    if not _exchange(new, path):
        old = new.with_suffix(".old")
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise
        os.rename(old, new)


def _took_free_place(new: Path, path: Path) -> bool:
    """Whether `new` could be put where nothing was; somebody else may do so at the same time."""
    if path.exists():
        return False
    try:
        os.rename(new, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step (renameat2 of Linux); False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _mode(mode: int) -> int:
    """What the user's umask leaves of a mode; temporary files are made for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; a folder that cannot be opened so (Windows) is left."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files of lines that several processes append to and rewrite, and that lose nothing.

Writers take turns by a lock on a file beside the data: the data file itself is replaced when it is
rewritten, so that a lock on it would be a lock on the past. Readers take no lock. They see whole
lines, but for a last one that is being written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other writers of `path` out; its folder is created where it is missing.

    Where the system or the file system has no locks, nothing is kept out: appending still loses
    nothing there, since a line is one write, but rewriting may lose what is appended meanwhile.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(path.name + ".lock")
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _wait(descriptor)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int) -> None:
    try:
        import fcntl  # not everywhere; reading a store must work without
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # some cluster file systems are mounted without
            raise


def append_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Add lines, and return when the disk has them. To be called under the lock.

    A line that an earlier crash tore is closed first, so that it costs itself only; where writing
    fails the file gets its old length back.

    Raises:
        OSError: the file cannot be written.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = (b"\n" if torn else b"") + b"".join(line + b"\n" for line in lines)
        try:
            _write(descriptor, data)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
    if size == 0:
        _sync_folder(path.parent)


def replace_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Put these lines in the place of the file's, at once. To be called under the lock.

    Raises:
        OSError: the file cannot be written; it is as it was.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        try:
            with suppress(FileNotFoundError):
                os.fchmod(descriptor, os.stat(path).st_mode & 0o7777)
            _write(descriptor, b"".join(line + b"\n" for line in lines))
        finally:
            os.close(descriptor)
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    _sync_folder(path.parent)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """The name of a new file is durable only when its folder is."""
    with suppress(OSError):  # not every system opens folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

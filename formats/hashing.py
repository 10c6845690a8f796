"""SHA-256 of files, read piece by piece."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def sha256_file(path: str | Path) -> str:
    """Hash a file of any size in constant memory.

    Returns:
        64 lower-case hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Hash several files at once, on as many processor cores as there are.

    Raises:
        OSError: a file cannot be read.
    """
    files = list(paths)
    with ThreadPoolExecutor(max(1, min(len(files), os.cpu_count() or 1))) as pool:
        return dict(zip(files, pool.map(sha256_file, files), strict=True))

"""Engines that were compiled in memory before: kept under TILEWRIGHT_CACHE, so that a model that is
served again starts without being compiled.

An entry's name is a hash of all that an engine depends on: the model's files (place, size, time),
the options, what is known of kernels, our own source, and the versions of what we call. So nothing
is ever stale: another of these is another entry. Its weights stay in the checkpoint, whose hashes
are compared when it is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EngineError, UsageError
from ..settings import current
from .verified import code_digest

if TYPE_CHECKING:
    from ..runtime.image import EngineImage
    from .options import CompileOptions

FOLDER = "engines"
MOST_ENTRIES = 16
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "triton",
    "onnxruntime",
    "onnx",
    "tensorrt",
    "tensorrt_rtx",
)


def engine_key(path: str | Path, options: CompileOptions) -> str | None:
    """The name of a model's entry; None where it has to be compiled: code of the model's own may
    do anything, and who debugs or dumps passes wants to see them run.
    """
    switches = current()
    watched = switches.debug or switches.dump is not None or switches.pass_limit is not None
    if watched or options.trust_remote_code or options.random_weights is not None:
        return None
    digest = hashlib.sha256()
    for part in _parts(Path(path), options):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def cached_engine(key: str | None, path: str | Path) -> EngineImage | None:
    """The engine of a model at a path, None where there is none, or one that is damaged."""
    from ..runtime.folder import load_image

    if key is None or not (folder := _folder() / key).is_dir():
        return None
    try:
        image = load_image(folder, path)
        os.utime(folder)  # the ones that are used stay longest
    except (EngineError, OSError):
        return None
    return image


def keep_engine(key: str | None, image: EngineImage) -> bool:
    """Keeps an engine, and whether that was possible: a cache that cannot be written is no error,
    nor are weights that exist in memory alone.
    """
    from ..runtime.folder import save_engine

    if key is None:
        return False
    try:
        save_engine(image, _folder() / key, "reference")
    except (EngineError, UsageError):
        return False
    _evict()
    return True


def _parts(path: Path, options: CompileOptions) -> Iterator[str]:
    yield code_digest()
    yield repr(options)
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{package} {metadata.version(package)}"
    from .tuning import TABLES

    records = [current().cache / "tuning.jsonl", *sorted(TABLES.glob("*.jsonl"))]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    yield str(path.absolute())  # engines are named after it
    for file in (*records, *files):
        if file.is_file():
            facts = file.stat()
            yield f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"


def _evict() -> None:
    def age(folder: Path) -> float:
        return folder.stat().st_mtime

    with contextlib.suppress(OSError):  # another process evicts too
        entries = [folder for folder in _folder().iterdir() if not folder.name.startswith(".")]
        for folder in sorted(entries, key=age, reverse=True)[MOST_ENTRIES:]:
            shutil.rmtree(folder, ignore_errors=True)


def _folder() -> Path:
    return current().cache / FOLDER

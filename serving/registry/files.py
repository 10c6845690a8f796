"""Which files a model is made of, on disk and by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ...errors import CheckpointError, UsageError
from .manifest import Kind

# Weights as safetensors, and what configures model and tokenizer. Neither pickles nor code.
_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. +-]{0,199}")
_DEPTH = 3
CONFIG, GGUF = "config.json", "model.gguf"


def check_path(path: str) -> str:
    """A file's path within a model, if that is what it is.

    Raises:
        UsageError: it is none, or leads out of the model.
    """
    parts = path.split("/")
    if len(parts) > _DEPTH or not all(_PART.fullmatch(part) for part in parts):
        raise UsageError(
            "file name",
            expected=f"a path within the model, of up to {_DEPTH} plain names",
            found=repr(path[:100]),
            remedy="Name the files as they are in the model's folder.",
        )
    return path


def kind_of(paths: Iterable[str]) -> Kind:
    """What a model of these files is.

    Raises:
        UsageError: neither one .gguf file nor a Hugging Face folder.
    """
    names = set(paths)
    if len(names) == 1 and next(iter(names)).lower().endswith(".gguf"):
        return "gguf"
    if CONFIG in names and any(name.endswith(".safetensors") for name in names):
        return "folder"
    raise UsageError(
        "files of the model",
        expected=f"one .gguf file, or {CONFIG} and *.safetensors with the tokenizer's files",
        found=", ".join(sorted(names))[:200] or "none",
        remedy="Give all files of the model.",
    )


def files_at(path: Path) -> dict[str, Path]:
    """Path within the model → file, for a .gguf file or a Hugging Face folder.

    Raises:
        CheckpointError: nothing there.
        UsageError: something else.
    """
    if path.is_file():
        kind_of([path.name])
        return {GGUF: path}
    if not path.is_dir():
        raise CheckpointError(
            str(path),
            expected="a Hugging Face folder or a .gguf file",
            found="nothing there",
            remedy="Check the path; models are not downloaded.",
        )
    found = {
        file.relative_to(path).as_posix(): file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in _SUFFIXES and file.is_file()
    }
    # Hidden folders (a download's cache, a repository's history) are no part of the model.
    kept = {name: file for name, file in found.items() if _may_be_part(name)}
    kind_of(kept)
    return kept


def root_of(path: Path) -> str:
    """What a model's file or folder is called, without what `check_path` does not take."""
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", name).lstrip(".+-")[-200:] or "model"


def _may_be_part(name: str) -> bool:
    try:
        check_path(name)
    except UsageError:
        return False
    return True

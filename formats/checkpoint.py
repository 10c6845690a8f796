"""What a checkpoint is: names of tensors, each with a shape and a dtype, loaded only on demand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from ..errors import CheckpointError


@runtime_checkable
class LazyTensor(Protocol):
    """A tensor that is known by its header and read on demand."""

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes, in torch's order (the last one is contiguous)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `load` gives (float32 for block-quantized tensors)."""

    def load(self) -> torch.Tensor:
        """Read it to the CPU; CheckpointError where it is damaged.

        It may alias a memory map, so do not write to it.
        """


@runtime_checkable
class Checkpoint(Protocol):
    """A set of named lazy tensors."""

    @property
    def metadata(self) -> Mapping[str, object]:
        """What the file says beside its tensors: safetensors' strings, GGUF's typed fields."""

    def names(self) -> tuple[str, ...]:
        """The names of all tensors, in the order of the files."""

    def tensor(self, name: str) -> LazyTensor:
        """One tensor by name; an unknown one raises CheckpointError."""

    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors; none for a checkpoint without files."""


def unknown_tensor(name: str, names: tuple[str, ...], where: str) -> CheckpointError:
    """The error for a tensor that a checkpoint lacks; it lists the names that are closest."""
    import difflib

    close = difflib.get_close_matches(name, names, n=3) or list(names[:3])
    return CheckpointError(
        f"{where}: tensor {name!r}",
        expected=f"one of its {len(names)} tensors, such as {', '.join(close) or 'none'}",
        found="no tensor of that name",
        remedy="Check that the checkpoint belongs to this model.",
    )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file, a safetensors file, or a folder of safetensors files; tensors stay on disk.

    Args:
        path: `*.gguf`, `*.safetensors`, `*.safetensors.index.json`, or a folder with one of
            the latter two.

    Raises:
        CheckpointError: it is missing, of another kind, or damaged.
    """
    from .gguf import GGUFCheckpoint
    from .safetensors import SafetensorsCheckpoint

    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            str(path),
            expected="a .gguf file, a .safetensors file or a model folder",
            found="no such file or folder",
            remedy="Check the path.",
        )
    if path.is_dir():
        return SafetensorsCheckpoint(_folder_file(path))
    if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
        return GGUFCheckpoint(path)
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        return SafetensorsCheckpoint(path)
    raise CheckpointError(
        str(path),
        expected="a .gguf file, a .safetensors file, its .index.json, or a folder of them",
        found=f"a file that ends in {path.suffix or 'nothing'}",
        remedy="Convert the model to safetensors (save_pretrained does) or GGUF.",
    )


def _folder_file(folder: Path) -> Path:
    """Pick the index or the only safetensors file of a folder, as Hugging Face names them."""
    for name in ("model.safetensors.index.json", "model.safetensors"):
        if (folder / name).exists():
            return folder / name
    found = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    others = sorted(p.name for p in folder.iterdir())[:8]
    raise CheckpointError(
        str(folder),
        expected="model.safetensors or model.safetensors.index.json",
        found=f"{len(found)} safetensors files"
        if found
        else f"none among {', '.join(others) or 'no files'}",
        remedy="Save the model with save_pretrained (safetensors), or name one file.",
    )


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise CheckpointError(
            str(path), expected="a readable file", found=str(error), remedy="Check the permissions."
        ) from error

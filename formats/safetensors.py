"""Safetensors checkpoints, of one file or many with an index, mapped and read by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..errors import CheckpointError
from .checkpoint import unknown_tensor

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class _Handle(Protocol):
    """The part of safetensors' `safe_open` (which has no types) that is used here."""

    def metadata(self) -> dict[str, str] | None: ...
    def offset_keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """A tensor of a safetensors file; shape and dtype come from the file's header."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    handle: _Handle

    def load(self) -> torch.Tensor:
        """Map it in; raises CheckpointError where the file changed or is damaged."""
        try:
            return self.handle.get_tensor(self.name)
        except Exception as error:  # safetensors raises its own type, OSError or ValueError
            raise damaged(self.file, f"tensor {self.name}: {error}") from error


class SafetensorsCheckpoint:
    """The tensors of one safetensors file, or of the shards that an index lists.

    Args:
        path: a `.safetensors` file or a `.safetensors.index.json`.

    Raises:
        CheckpointError: a file is missing, cut off or damaged, or a shard lacks a tensor that
            the index places in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        index = _read_index(path) if path.name.endswith(".json") else None
        shards = sorted(set(index.values())) if index is not None else [path.name]
        self._files = tuple(path.parent / shard for shard in shards)
        self._metadata: dict[str, object] = {}
        self._tensors: dict[str, SafetensorsTensor] = {}
        for file in self._files:
            self._tensors.update(self._open(file))
        if index is not None:
            _check_index(path, index, self._tensors)

    @property
    def metadata(self) -> Mapping[str, object]:
        """The `__metadata__` strings of all files."""
        return self._metadata

    def names(self) -> tuple[str, ...]:
        """The names of all tensors, file by file."""
        return tuple(self._tensors)

    def tensor(self, name: str) -> SafetensorsTensor:
        """One tensor by name; an unknown one raises CheckpointError."""
        if name not in self._tensors:
            raise unknown_tensor(name, self.names(), str(self._path))
        return self._tensors[name]

    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return self._files

    def _open(self, file: Path) -> dict[str, SafetensorsTensor]:
        from safetensors import safe_open

        if not file.is_file():
            raise CheckpointError(
                str(file),
                expected="a safetensors file",
                found="no such file",
                remedy="Download the missing shard again.",
            )
        try:
            handle: _Handle = safe_open(file, framework="pt")
            self._metadata.update(handle.metadata() or {})
            headers = [(name, handle.get_slice(name)) for name in handle.offset_keys()]
            rows = [(name, tuple(h.get_shape()), h.get_dtype()) for name, h in headers]
        except Exception as error:  # safetensors raises its own type, OSError or ValueError
            raise damaged(file, str(error)) from error
        return {
            name: SafetensorsTensor(name, shape, _dtype(file, name, dtype), file, handle)
            for name, shape, dtype in rows
        }


def _dtype(file: Path, name: str, dtype: str) -> torch.dtype:
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r}",
            expected=f"one of the dtypes {', '.join(_DTYPES)}",
            found=dtype,
            remedy="Save the model in one of these dtypes.",
        )
    return _DTYPES[dtype]


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"no readable weight_map ({error})") from error
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise damaged(path, "a weight_map that does not map names to files")
    for shard in index.values():
        if Path(shard).name != shard:
            raise damaged(path, f"the shard {shard!r}, which is not beside the index")
    return index


def _check_index(
    path: Path, index: Mapping[str, str], tensors: Mapping[str, SafetensorsTensor]
) -> None:
    for name, shard in index.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise damaged(path, f"tensor {name!r}, which {shard} lacks")


def damaged(file: Path, found: str) -> CheckpointError:
    """The error for a file that is cut off or not what its header says."""
    return CheckpointError(
        str(file),
        expected="a whole, undamaged checkpoint file",
        found=found,
        remedy="The file may be cut off: download or save it again.",
    )

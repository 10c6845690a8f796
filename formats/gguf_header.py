"""The header of a GGUF file: typed metadata and the table of tensors, read within its bounds.

The `gguf` package's own reader builds two numpy arrays for every token of the vocabulary (2.7 s for
49k tokens), and goes on past the end of a truncated file; so the header is read here, and the
package gives the type tables and the block formats. Layout: the GGUF specification, version 2, 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError

_STRING, _ARRAY = 8, 9
# GGUF value type → its struct letter (u8 i8 u16 i16 u32 i32 f32 bool, then u64 i64 f64)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_MAX_DIMS = 4  # GGML_MAX_DIMS
_VERSIONS = (2, 3)


@dataclass(frozen=True, slots=True)
class GGUFEntry:
    """One row of the tensor table.

    Attributes:
        name: e.g. "blk.0.attn_q.weight".
        shape: sizes in torch's order (GGUF stores them reversed).
        type_id: the number of its ggml type.
        offset: first byte, counted from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What precedes the tensor data of a GGUF file."""

    metadata: Mapping[str, object]
    entries: tuple[GGUFEntry, ...]


class _Cursor:
    """Reads little-endian values one after another; `EOFError` beyond the end of the file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def values(self, letter: str, count: int = 1) -> tuple[int | float | bool, ...]:
        start = self._advance(count * struct.calcsize(f"<{letter}"))
        return struct.unpack_from(f"<{count}{letter}", self.data, start)

    def integer(self, letter: str) -> int:
        return int(self.values(letter)[0])

    def string(self) -> str:
        size = self.integer("Q")
        start = self._advance(size)
        return str(self.data[start : start + size], "utf-8")

    def value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self.values(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.integer("I"), self.integer("Q")
            if item in _SCALARS:
                return list(self.values(_SCALARS[item], count))
            if item == _STRING:
                return [self.string() for _ in range(count)]
            raise ValueError(f"an array of value type {item}")
        raise ValueError(f"value type {kind}")

    def _advance(self, size: int) -> int:
        start = self.position
        if size > len(self.data) - start:
            raise EOFError(f"the file ends at byte {len(self.data)}, inside its header")
        self.position = start + size
        return start


def read_gguf_header(path: Path, data: memoryview) -> GGUFHeader:
    """Read metadata and tensor table from the bytes of a GGUF file.

    Args:
        path: named in errors.
        data: the whole file, 1 byte an element (a memory map will do).

    Raises:
        CheckpointError: bad magic, an unknown version or byte order, a cut-off or damaged header.
    """
    if bytes(data[:4]) != b"GGUF":
        raise CheckpointError(
            str(path),
            expected="a GGUF file, which begins with the bytes GGUF",
            found=repr(bytes(data[:4])),
            remedy="Check that it is a model file, downloaded whole.",
        )
    try:
        return _read(_Cursor(data))
    except (EOFError, ValueError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            str(path),
            expected="a whole, undamaged GGUF header of version 2 or 3",
            found=str(error),
            remedy="The file may be cut off: download or convert it again.",
        ) from error


def _read(cursor: _Cursor) -> GGUFHeader:
    cursor.values("I")
    version = cursor.integer("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise ValueError("big-endian byte order" if swapped else f"version {version}")
    tensor_count, field_count = cursor.integer("Q"), cursor.integer("Q")
    metadata: dict[str, object] = {}
    for _ in range(field_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.integer("I"))
    rows = [_row(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise ValueError(f"general.alignment {alignment!r}")
    start = math.ceil(cursor.position / alignment) * alignment
    entries = tuple(GGUFEntry(name, shape, kind, start + at) for name, shape, kind, at in rows)
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError("two tensors of one name")
    return GGUFHeader(metadata, entries)


def _row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, num_dims = cursor.string(), cursor.integer("I")
    if num_dims > _MAX_DIMS:
        raise ValueError(f"tensor {name!r} of {num_dims} dimensions")
    dims = [int(size) for size in cursor.values("Q", num_dims)]
    return name, tuple(reversed(dims)), cursor.integer("I"), cursor.integer("Q")

"""GGUF checkpoints: mapped into memory, dequantized to float32 tensor by tensor when loaded.

A quantized matrix is there a second time as the blocks that the file holds, uint8 [N, bytes of a
row], under its name and `BLOCKS`; `kept_codes` makes of these the weight in codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..errors import CheckpointError
from .checkpoint import unknown_tensor
from .gguf_header import GGUFEntry, read_gguf_header
from .stored_codes import StoredCodes
from .weight_ggml import BLOCK_FORMS, OFFSET_FORMS
from .weights import Stored, apply_weight

SUPPORTED_TYPES: tuple[str, ...] = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_0",
)
"""The ggml tensor types that can be loaded."""

BLOCKS = ":blocks"
"""After a tensor's name: its blocks, as they are."""

# gguf works through a 1-D array in one go; about a megabyte of results keeps its temporaries in L2
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class GGUFTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: its GGUF name.
        shape: sizes in torch's order.
        dtype: float32, whatever the file holds.
        type_name: the ggml type it is stored in, e.g. "Q4_K".
        blocks: its bytes in the memory map, uint8[n].
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    type_name: str
    blocks: npt.NDArray[np.uint8]

    def load(self) -> torch.Tensor:
        """Dequantize to a new float32 tensor (gguf.quants holds the block formats)."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.type_name]
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        result = np.empty(math.prod(self.shape), dtype=np.float32)
        # the package reads F32 and F16 as numbers, and all others as bytes
        stored = {"F32": np.float32, "F16": np.float16}.get(self.type_name)
        data = self.blocks if stored is None else self.blocks.view(stored)
        unit = block_bytes if stored is None else 1
        for start in range(0, result.size, _CHUNK_ELEMENTS):
            stop = min(start + _CHUNK_ELEMENTS, result.size)
            part = data[start // block_elements * unit : stop // block_elements * unit]
            result[start:stop] = dequantize(part, kind)
        return torch.from_numpy(result.reshape(self.shape))


@dataclass(frozen=True, slots=True, eq=False)
class GGUFBlocks:
    """The blocks of a quantized matrix.

    Attributes:
        name: its GGUF name, then `BLOCKS`.
        shape: rows, and bytes of each.
        dtype: uint8.
        type_name: the ggml type, a key of `BLOCK_FORMS`.
        blocks: the bytes in the memory map, uint8[n].
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    type_name: str
    blocks: npt.NDArray[np.uint8]

    def load(self) -> torch.Tensor:
        """A copy of the bytes."""
        return torch.from_numpy(np.array(self.blocks).reshape(self.shape))


class GGUFCheckpoint:
    """The tensors and metadata of a GGUF file.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is missing, cut off, damaged, one part of a split model, or holds a
            tensor of a type that is not in `SUPPORTED_TYPES`.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        data = _map(self._path)
        header = read_gguf_header(self._path, data.data)
        if header.metadata.get("split.count", 0) not in (0, 1):
            raise CheckpointError(
                str(path),
                expected="a GGUF file that holds the whole model",
                found=f"one of {header.metadata['split.count']} parts",
                remedy="Merge the parts with llama.cpp's gguf-split --merge.",
            )
        self._metadata = header.metadata
        self._tensors = {entry.name: _tensor(self._path, data, entry) for entry in header.entries}

    @property
    def metadata(self) -> Mapping[str, object]:
        """The typed fields of the header: int, float, bool, str, or a list of one of them."""
        return self._metadata

    def names(self) -> tuple[str, ...]:
        """The GGUF names of all tensors, in the file's order."""
        return tuple(self._tensors)

    def tensor(self, name: str) -> GGUFTensor | GGUFBlocks:
        """One tensor by its GGUF name, or its blocks; an unknown one raises CheckpointError."""
        found = self._tensors.get(name.removesuffix(BLOCKS))
        if found is None or (name.endswith(BLOCKS) and not _has_blocks(found)):
            raise unknown_tensor(name, self.names(), str(self._path))
        if not name.endswith(BLOCKS):
            return found
        shape = (found.shape[0], found.blocks.size // found.shape[0])
        return GGUFBlocks(name, shape, torch.uint8, found.type_name, found.blocks)

    def files(self) -> tuple[Path, ...]:
        """The file itself."""
        return (self._path,)


def _has_blocks(tensor: GGUFTensor) -> bool:
    return tensor.type_name in BLOCK_FORMS and len(tensor.shape) == 2 and 0 not in tensor.shape


def kept_codes(checkpoint: GGUFCheckpoint, name: str) -> StoredCodes | None:
    """A matrix [N, K] in the codes that the file holds; None for one that it holds in numbers.

    That the scales are finite is checked when they are loaded.
    """
    tensor = checkpoint.tensor(name)
    if not isinstance(tensor, GGUFTensor) or not _has_blocks(tensor):
        return None
    form, rows = tensor.type_name, Stored(checkpoint, name + BLOCKS)
    codes, scale = (apply_weight(f"ggml_{part}", (rows,), form=form) for part in ("codes", "scale"))
    zero = apply_weight("ggml_zero", (rows,), form=form) if form in OFFSET_FORMS else None
    return StoredCodes(
        codes,
        apply_weight("finite", (scale,)),
        None if zero is None else apply_weight("finite", (zero,)),
        group=BLOCK_FORMS[form].group,
    )


def _map(path: Path) -> npt.NDArray[np.uint8]:
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:  # numpy refuses to map an empty file with ValueError
        raise CheckpointError(
            str(path),
            expected="a readable GGUF file",
            found=str(error),
            remedy="Check the path; download the file again if it is empty.",
        ) from error


def _tensor(path: Path, data: npt.NDArray[np.uint8], entry: GGUFEntry) -> GGUFTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    names = {int(kind): kind.name for kind in GGMLQuantizationType}
    type_name = names.get(entry.type_id, f"number {entry.type_id}")
    if type_name not in SUPPORTED_TYPES:
        raise CheckpointError(
            f"{path}: tensor {entry.name!r}",
            expected=f"one of the types {', '.join(SUPPORTED_TYPES)}",
            found=f"type {type_name}",
            remedy="Convert the model to one of these types.",
        )
    block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    elements = math.prod(entry.shape)
    stop = entry.offset + elements // block_elements * block_bytes
    whole_rows = elements == 0 or entry.shape[-1] % block_elements == 0
    if not whole_rows or stop > data.size:
        found = f"the file ends at byte {data.size}" if whole_rows else f"shape {entry.shape}"
        raise CheckpointError(
            f"{path}: tensor {entry.name!r}",
            expected=f"{type_name} data up to byte {stop} in rows of whole blocks",
            found=found,
            remedy="The file may be cut off: download or convert it again.",
        )
    blocks = data[entry.offset : stop]
    return GGUFTensor(entry.name, entry.shape, torch.float32, type_name, blocks)

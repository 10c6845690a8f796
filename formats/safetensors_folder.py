"""Tensors written to a folder as Hugging Face names them: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

SHARD_BYTES = 4 << 30


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> int:
    """Write tensors in the order they come; no more than a shard of them is in memory.

    Args:
        folder: that they are written to, as ``model*.safetensors``.
        tensors: names and tensors on the CPU.
        shard_bytes: a file that holds as many is closed.

    Returns:
        The bytes of all tensors.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        held[name] = tensor
        size += tensor.nbytes
        if size >= shard_bytes:
            shards.append(_flush(folder, held, len(shards)))
            total, size, held = total + size, 0, {}
    if held or not shards:
        shards.append(_flush(folder, held, len(shards)))
    _name_shards(folder, shards, total + size)
    return total + size


def _flush(folder: Path, held: dict[str, Tensor], index: int) -> list[str]:
    from safetensors.torch import save_file

    save_file(held, _unnamed(folder, index), {"format": "pt"})
    return list(held)


def _unnamed(folder: Path, index: int) -> Path:
    return folder / f"shard-{index}.safetensors"


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Names say how many there are, which is known at the end."""
    if len(shards) == 1:
        _unnamed(folder, 0).rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        _unnamed(folder, index).rename(folder / file)
        places |= dict.fromkeys(names, file)
    listed = {"metadata": {"total_size": total}, "weight_map": places}
    text = json.dumps(listed, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

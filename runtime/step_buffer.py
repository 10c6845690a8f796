"""A step's metadata in one piece of device memory, filled by a single copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .step import Step

_ALIGNMENT = 16
FIELDS: Mapping[str, torch.dtype] = {
    "token_ids": torch.int64,
    "positions": torch.int64,
    "slot_mapping": torch.int64,
    "logits_indices": torch.int64,
    "query_start": torch.int32,
    "seq_lens": torch.int32,
    "block_tables": torch.int32,
}
"""The tensors of a `Step` and their element types, in the order in which they lie."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """How large a step is: T tokens of B sequences with M pages each, R rows of logits."""

    tokens: int
    sequences: int
    pages: int
    rows: int

    @staticmethod
    def of(step: Step) -> StepShape:
        """The shape of a step as it is."""
        count, pages = step.block_tables.shape
        return StepShape(len(step.token_ids), count, pages, len(step.logits_indices))

    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each field."""
        return {
            "token_ids": (self.tokens,),
            "positions": (self.tokens,),
            "slot_mapping": (self.tokens,),
            "logits_indices": (self.rows,),
            "query_start": (self.sequences + 1,),
            "seq_lens": (self.sequences,),
            "block_tables": (self.sequences, self.pages),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all fields, each aligned."""
        return sum(_padded(shape, FIELDS[name]) for name, shape in self.sizes().items())


class StepBuffer:
    """Host and device memory of one size, in which the fields of a shape have fixed places.

    Args:
        nbytes: of the largest step that it holds.
        device: where the Program runs.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.device = torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def views(self, shape: StepShape) -> dict[str, torch.Tensor]:
        """The fields on the device; the same memory whenever the shape is the same."""
        return _views(self.device, shape)

    def fill(self, step: Step, shape: StepShape) -> None:
        """Writes a step, padded to a shape at least as large, by one copy.

        Padding sequences have no tokens. Padding tokens belong to no sequence and write to slot 0,
        which page 0, reserved, holds. Padding rows of logits repeat row 0.
        """
        fields = _views(self.host, shape)
        for name, field in fields.items():
            value: torch.Tensor = getattr(step, name)
            if value.shape == field.shape:
                field.copy_(value)
                continue
            field.fill_(int(value[-1]) if name == "query_start" else 0)
            field[tuple(slice(size) for size in value.shape)] = value
        count = shape.nbytes
        self.device[:count].copy_(self.host[:count], non_blocking=True)


def _views(memory: torch.Tensor, shape: StepShape) -> dict[str, torch.Tensor]:
    found, start = {}, 0
    for name, size in shape.sizes().items():
        dtype = FIELDS[name]
        count = torch.Size(size).numel() * dtype.itemsize
        found[name] = memory[start : start + count].view(dtype).view(size)
        start += _padded(size, dtype)
    return found


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = torch.Size(shape).numel() * dtype.itemsize
    return -(-count // _ALIGNMENT) * _ALIGNMENT

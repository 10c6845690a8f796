"""A step's metadata in one piece of device memory, filled by a single copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
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
"""The tensors of a `Step` and their element types."""
SAMPLING: Mapping[str, torch.dtype] = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "uniform": torch.float32,
}
"""What a Program that samples is told beside, one number a sequence."""
GROUPS: Mapping[str, torch.dtype] = {
    "group_rows": torch.int32,
    "group_ids": torch.int32,
    "shared_pages": torch.int32,
}
"""Which sequences share pages, as ``share_pages`` takes it; zeros for none."""
FEED = {"feed_rows": torch.int64}
"""No input of a Program: the row of the step before that holds each sequence's token."""
# What is copied without its first or its last field stays one piece: token_ids may be on the device
# already, block_tables are large and seldom change.
_ORDER = {"token_ids": torch.int64, **FEED, **SAMPLING, **FIELDS, **GROUPS}
_ORDER["block_tables"] = _ORDER.pop("block_tables")


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

    def size(self, name: str) -> tuple[int, ...]:
        """Shape of a field."""
        if name in ("token_ids", "positions", "slot_mapping"):
            return (self.tokens,)
        if name == "block_tables":
            return (self.sequences, self.pages)
        if name == "logits_indices":
            return (self.rows,)
        return (self.sequences + (name == "query_start"),)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields of a shape lie.

    Attributes:
        places: of each field its first byte, the one after its last, type and shape.
        nbytes: of all fields, each aligned.
    """

    places: Mapping[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = field(repr=False)
    nbytes: int

    @staticmethod
    def of(shape: StepShape, names: Iterable[str] = FIELDS) -> Layout:
        """The layout of the named fields; their order is always the same."""
        wanted, start = frozenset(names), 0
        places = {}
        for name, dtype in _ORDER.items():
            if name in wanted:
                size = shape.size(name)
                stop = start + torch.Size(size).numel() * dtype.itemsize
                places[name] = (start, stop, dtype, size)
                start = -(-stop // _ALIGNMENT) * _ALIGNMENT
        return Layout(places, start)

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The fields in memory u8[…]."""
        return {
            name: memory[start:stop].view(dtype).view(size)
            for name, (start, stop, dtype, size) in self.places.items()
        }


def write_step(step: Step, fields: Mapping[str, np.ndarray]) -> None:
    """Writes a step into fields at least as large, which are padded.

    Padding sequences have no tokens. Padding tokens belong to no sequence and write to slot 0,
    which page 0, reserved, holds. Padding rows of logits repeat row 0.
    """
    for name in FIELDS:
        view = fields.get(name)
        if view is None:
            continue
        value = getattr(step, name).numpy()
        if value.shape != view.shape:
            view.fill(value[-1] if name == "query_start" else 0)
        if value.ndim == 1:
            view[: len(value)] = value
        else:
            view[: value.shape[0], : value.shape[1]] = value


class StepBuffer:
    """Host and device memory of one step of any kind.

    Args:
        shape: of the step.
        device: where the Program runs.
    """

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self.layout = Layout.of(shape)
        nbytes = self.layout.nbytes
        self.host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.views = self.layout.views(self.device)

    def fill(self, step: Step) -> None:
        """Writes a step, padded to the shape (`write_step`), by one copy."""
        fields = {name: view.numpy() for name, view in self.layout.views(self.host).items()}
        write_step(step, fields)
        self.device.copy_(self.host, non_blocking=True)

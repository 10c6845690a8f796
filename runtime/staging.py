"""The way of weights to a GPU: through pinned buffers, on a stream of each thread's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..formats.weight_base import HOST, Placement

if TYPE_CHECKING:
    from torch import Tensor

STAGE_BYTES = 8 * 2**20  # beyond this a copy is no faster, and each thread pins two of them


class GPUPlacement(Placement):
    """Brings host tensors to a GPU block by block; used by one thread.

    The processor copies (or narrows) a block into one pinned buffer while the other is on its way;
    a mapped file is read by that copy. What widens is widened on the GPU.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # What the caller's stream did to the memory that is written here comes first.
        self._caller = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(device)
        self._lanes: list[tuple[Tensor, torch.cuda.Event]] = []

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Inside, what torch does on the device is ordered with the copies; they are done after."""
        self._stream.wait_stream(self._caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # after an error too: the memory must not be given away while it is written
            self._stream.synchronize()

    def bring(self, tensor: Tensor) -> Tensor:
        """A copy on the device."""
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        self.fill(out, tensor)
        return out

    def fill(self, out: Tensor, tensor: Tensor) -> None:
        """Copies `tensor`, cast to the dtype of `out`, into `out` on the device."""
        limit = STAGE_BYTES // max(out.dtype.itemsize, tensor.dtype.itemsize)
        for region, part in blocks(out, tensor, limit):
            self._send(region, part)

    def _send(self, region: Tensor, part: Tensor) -> None:
        buffer, sent = self._lane()
        sent.synchronize()
        dtype = min(part.dtype, region.dtype, key=lambda dtype: dtype.itemsize)
        staged = buffer[: part.numel() * dtype.itemsize].view(dtype).view(part.shape)
        staged.copy_(part)
        if dtype != region.dtype:
            region.copy_(staged.to(self.device, non_blocking=True))
        else:
            region.copy_(staged, non_blocking=True)
        sent.record(self._stream)

    def _lane(self) -> tuple[Tensor, torch.cuda.Event]:
        """The buffer whose turn it is, and the event of its last copy."""
        if len(self._lanes) < 2:
            buffer = torch.empty(STAGE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
            self._lanes.append((buffer, torch.cuda.Event()))
        else:
            self._lanes.reverse()
        return self._lanes[-1]


def blocks(out: Tensor, tensor: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts two tensors of one shape alike, along the first axis while that suffices, into pairs of
    at most `limit` elements.
    """
    if tensor.numel() <= limit:
        if tensor.numel():
            yield out, tensor
        return
    row = tensor[0].numel()
    if row > limit:
        for region, part in zip(out, tensor, strict=True):
            yield from blocks(region, part, limit)
        return
    step = limit // row
    for start in range(0, tensor.shape[0], step):
        yield out[start : start + step], tensor[start : start + step]


def placement(device: torch.device) -> Placement:
    """How one thread brings weights to a device."""
    return GPUPlacement(device) if device.type == "cuda" else HOST

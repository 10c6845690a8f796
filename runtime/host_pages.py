"""Pages of the KV cache in the host's memory, for what the device has no room for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import CapacityError


class HostPages:
    """Room for pages of all KV buffers of a device; a page of all layers lies in one piece.

    A page goes through one buffer on the device, so that it crosses the bus in one copy. Copies are
    queued in order with the steps, and nothing waits for them: the host never reads what it holds.

    Args:
        tensors: the KV buffers [N, …], all on one device.
        count: pages.

    Raises:
        CapacityError: the host lacks the memory.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], count: int) -> None:
        self._tensors = [tensor.view(torch.uint8).flatten(1) for tensor in tensors]
        size = sum(tensor.shape[1] for tensor in self._tensors)
        device = self._tensors[0].device
        try:
            self._memory = torch.empty(
                (count, size), dtype=torch.uint8, pin_memory=device.type == "cuda"
            )
        except RuntimeError as error:
            raise CapacityError(
                "KVCacheConfig.swap_space",
                expected=f"{count * size / 2**30:.2f} GiB of the host's memory",
                found=str(error).splitlines()[0],
                remedy="Lower it.",
            ) from error
        self._passing = torch.empty(size, dtype=torch.uint8, device=device)
        self._parts = self._passing.split([tensor.shape[1] for tensor in self._tensors])

    def store(self, page: int, place: int) -> None:
        """Copies a page of the device to a place here."""
        torch.cat([tensor[page] for tensor in self._tensors], out=self._passing)
        self._memory[place].copy_(self._passing, non_blocking=True)

    def load(self, place: int, page: int) -> None:
        """Copies what a place holds to a page of the device."""
        self._passing.copy_(self._memory[place], non_blocking=True)
        torch._foreach_copy_([tensor[page] for tensor in self._tensors], list(self._parts))

"""CUDA graphs that share one pool of memory, since no two of them run at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .device_queue import Replayable

_Found = TypeVar("_Found")


class GraphPool:
    """Records work on a CUDA device.

    Attributes:
        bytes: device memory that the captures took, beside weights and caches.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._pool: Any = None  # torch names no public type for it

    def capture(self, work: Callable[[], _Found]) -> tuple[Replayable, _Found]:
        """The graph of ``work``, and what it returned: tensors that each replay writes.

        Libraries have set themselves up for the work: it has been run before. It is recorded on a
        stream that no library has worked on: what cuBLAS keeps for a stream is then made in the
        graph's own pool. Elsewhere it would be freed under us, as torch.compile frees it for its
        own graphs.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # as the capture does: what it frees is not the graph's
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.device)
        # Other threads may allocate meanwhile: only this one is held to what a capture allows.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            found = work()
        self._pool = graph.pool()
        self.bytes += torch.cuda.memory_reserved(self.device) - before
        return graph, found

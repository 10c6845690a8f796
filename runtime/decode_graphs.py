"""Decode steps as CUDA graphs: one replay a step, one graph a bucket of sequences.

A bucket is captured when it is first met. All graphs share one memory pool, since no two run at
once, and one buffer of metadata, which a single copy fills before each replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..codegen.program import Program
from .runner import ProgramRunner
from .step import Step
from .step_buffer import StepBuffer, StepShape

_DENSE_UP_TO, _STRIDE = 8, 8  # buckets: 1, 2, 4, 8, 16, 24, 32, …
# Ops whose torch functions wait for the device, or copy from the host: no graph can hold them.
_SYNCHRONISE = frozenset(
    {"moe_experts", "cond", "aten", "fused", "paged_attention", "slot_attention", "dim_value"}
)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # f32[bucket, V], written by each replay


class DecodeGraphs:
    """Graphs of the decode steps of one Program.

    Args:
        runner: of the Program; its weights are on a CUDA device.
        caches: the KV buffers by input name; the graphs hold their addresses.
        max_sequences: the most sequences of a step.
        max_pages: pages of the longest sequence.

    Attributes:
        captured: by bucket.
        bytes: device memory that the captures took, beside weights and caches.
    """

    def __init__(
        self,
        runner: ProgramRunner,
        caches: Mapping[str, torch.Tensor],
        max_sequences: int,
        max_pages: int,
    ) -> None:
        self.runner, self.caches = runner, caches
        self.max_sequences, self.max_pages = max_sequences, max_pages
        self.captured: dict[int, _Captured] = {}
        self.bytes = 0
        self._pool: Any = None  # torch names no public type for it
        largest = bucket_of(max_sequences)
        nbytes = StepShape(largest, largest, max_pages, largest).nbytes
        self.metadata = StepBuffer(nbytes, runner.device)

    def run(self, step: Step) -> torch.Tensor | None:
        """Logits f32[R, V] of a decode step, valid until the next one; None for other steps."""
        count = len(step.seq_lens)
        if not is_decode(step) or count > self.max_sequences:
            return None
        bucket = bucket_of(count)
        shape = StepShape(bucket, bucket, self.max_pages, bucket)
        self.metadata.fill(step, shape)
        captured = self.captured.get(bucket)
        if captured is None:
            captured = self.captured[bucket] = self._capture(shape)
        captured.graph.replay()
        return captured.logits[:count]

    def _capture(self, shape: StepShape) -> _Captured:
        """Runs the step once, for libraries to set themselves up, then records it on a stream that
        no library has worked on: what cuBLAS keeps for a stream is then made in the graph's own
        pool. Elsewhere it would be freed under us, as torch.compile frees it for its own graphs.
        """
        inputs = {**self.metadata.views(shape), **self.caches}
        device = self.runner.device
        self.runner.run(inputs)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # as the capture does: what it frees is not the graph's
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: only this one is held to what a capture allows.
        stream = torch.cuda.Stream(device)
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            logits = self.runner.run(inputs)["logits"].float()
        self._pool = graph.pool()
        self.bytes += torch.cuda.memory_reserved(device) - before
        return _Captured(graph, logits)


def is_decode(step: Step) -> bool:
    """Whether every sequence brings one token, and wants its logits."""
    return len(step.token_ids) == len(step.seq_lens) == len(step.logits_indices)


def bucket_of(count: int) -> int:
    """The bucket for so many sequences: the next power of 2, multiples of 8 from there on."""
    if count <= _DENSE_UP_TO:
        return 1 << (count - 1).bit_length()
    return -(-count // _STRIDE) * _STRIDE


def obstacles(program: Program) -> list[str]:
    """The ops of a Program that keep its decode step out of a CUDA graph."""
    found = (call.kernel.split("/", 1)[1] for call in program.calls if call.loader == "eager")
    return sorted(set(found) & _SYNCHRONISE)

"""Decode steps of one model with two choices of kernels, as CUDA graphs beside each other.

Both run over the same weights, KV cache and inputs, so that they differ in their kernels alone, and
a model that fits once fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import CapacityError
from ..runtime.base_engine import check_device
from ..runtime.decode_graphs import DecodeGraphs, bucket_of
from ..runtime.executor import PagedExecutor
from ..runtime.image import EngineImage
from ..runtime.runner import ProgramRunner
from ..runtime.step import Step
from ..runtime.weights import place_weights
from .confirm import Side
from .regress.timing.steps import StepSetting, make_step, pages_of

CONTEXT = 512
BLOCK = 8
"""Steps between two clocks: some milliseconds, so that neither the clock nor the host counts."""


class DecodeSteps:
    """Steps of old and new choices, captured.

    Args:
        old, new: images of one model for this machine's GPU, which differ in their decode Program.
        batches: sizes of the steps.

    Raises:
        EngineError: the images are for another device.
        CapacityError: weights, KV cache and steps do not fit the device.
    """

    def __init__(self, old: EngineImage, new: EngineImage, batches: Sequence[int]) -> None:
        check_device(new)
        lm = new.lm
        assert lm is not None
        self.lm, self.images = lm, {"old": old, "new": new}
        self.device = torch.device("cuda", torch.cuda.current_device())
        context = min(CONTEXT, lm.max_model_len)
        settings = [StepSetting(f"decode b{size}", size, 1, context) for size in batches]
        self.steps: dict[int, Step] = {s.sequences: make_step(s, lm) for s in settings}
        self.pages = 1 + max(s.sequences * pages_of(s, lm.page_size) for s in settings)
        self.most = max(batches)
        self.first: Side = "old"
        self.graphs: dict[str, DecodeGraphs] = {}
        try:
            self.weights = place_weights(new.weights, self.device).tensors
            self.caches = self._caches()
            self._load()
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"decode steps of {self.most}",
                expected="device memory for weights, KV cache and the steps of both choices",
                found=str(error).splitlines()[0],
                remedy="Give fewer with --batch, or free memory.",
            ) from error

    def seconds(self, side: Side, batch: int) -> float:
        """Of one step: the mean over a block of replays behind one that sets its inputs."""
        graphs = self.graphs[side]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graphs.run(self.steps[batch])
        replayed = graphs.captured[bucket_of(batch)].graph
        begin.record()
        for _ in range(BLOCK):
            replayed.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / BLOCK

    def reload(self) -> None:
        """Both anew, the other one first: code and graphs come to lie elsewhere."""
        self.first = "new" if self.first == "old" else "old"
        self._load()

    def _load(self) -> None:
        from ..codegen.triton.launch import LoadedFunction

        self.graphs = {}
        torch.cuda.empty_cache()
        LoadedFunction.forget()
        for side in ("old", "new") if self.first == "old" else ("new", "old"):
            runner = self._runner(side)
            pages = -(-self.lm.max_model_len // self.lm.page_size)
            self.graphs[side] = DecodeGraphs(runner, self.caches, self.most, pages)
        for step in self.steps.values():
            for graphs in self.graphs.values():
                graphs.run(step)  # captures
        torch.cuda.synchronize()

    def _runner(self, side: str) -> ProgramRunner:
        image = self.images[side]
        assert image.decode is not None
        read = image.files.__getitem__
        return ProgramRunner(image.decode.program, self.weights, read, device=self.device)

    def _caches(self) -> dict[str, torch.Tensor]:
        """KV buffers of the steps' size, full of random numbers: zeros take less power."""
        executor = PagedExecutor(self._runner("old"), self.most, self.lm.max_model_len)
        executor.caches.allocate({"N": self.pages, "P": self.lm.page_size})
        for tensor in executor.caches.tensors.values():
            if tensor.dtype.itemsize > 1:  # torch draws no 8-bit numbers
                tensor.normal_()
        return executor.caches.tensors

"""Steps of any kind as CUDA graphs: prompts, chunks of them, and mixes with decode.

Launching hundreds of kernels one by one takes the host longer than a GPU needs for a few hundred
tokens, and leaves gaps between them where there are more (2 of 64 ms for 4096). So a step is padded
to the next of some shapes, and each shape is captured when it is met for the second time: a length
that never comes again costs no capture. A load of all lengths meets a hundred shapes, and each
capture stalls all requests: where there are others, captures keep a distance in time, and steps run
as they are until then. Padding tokens belong to no sequence and write to page 0, which is reserved
(`step_buffer.write_step`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..codegen.program import FRESH, Call
from ..ir.dims import symbols_of
from .bucketing import Padding
from .decode_buffer import DecodeBuffer
from .device_queue import DeviceQueue, Replayable
from .graph_pool import GraphPool
from .runner import ProgramRunner
from .step import Step
from .step_buffer import FIELDS, StepShape

_TOKENS = 64  # token buckets from here on are multiples of it: 32 tokens of padding on average
_FEW_TOKENS = 16  # smaller ones are multiples of this
_SEQUENCES = (1, 4, 16, 64, 256)
_MOST = 48  # graphs; each holds a few MB of the device's memory
# The share of the time that captures may take, and the seconds beyond it for those of steps with
# one sequence, which keep nobody else waiting.
_SHARE, _ALONE = 0.01, 2.0


class Shape(NamedTuple):
    """What a graph is captured for: a padded step, and whether it is one new prompt alone."""

    tokens: int
    sequences: int
    rows: int
    fresh: bool


@dataclass(slots=True)
class _Captured:
    graph: Replayable
    logits: torch.Tensor  # [rows, V] in the model's type, written by each replay


class StepGraphs:
    """Graphs of the steps of a Program that takes any.

    Args:
        runner: of the Program; its weights are on a CUDA device.
        caches: the KV buffers by input name; the graphs hold their addresses.
        max_sequences: the most sequences of a step.
        max_pages: pages of the longest sequence.
        max_tokens: the most tokens of a step that is captured.
        queue: of the device, shared with whatever else runs on it.
        clock: seconds, for what captures take.

    Attributes:
        captured: by shape, the one that was not used for longest first.
        padding: what steps have computed to fill their buckets.
    """

    def __init__(
        self,
        runner: ProgramRunner,
        caches: Mapping[str, torch.Tensor],
        max_sequences: int,
        max_pages: int,
        max_tokens: int,
        queue: DeviceQueue,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.runner, self.caches, self.queue, self.clock = runner, caches, queue, clock
        self._started, self._captures = clock(), 0.0
        self._next = self._started  # when the next capture may keep others waiting
        self.max_pages, self.max_tokens = max_pages, max_tokens
        self.sequences = sorted({*(n for n in _SEQUENCES if n < max_sequences), max_sequences})
        self.captured: OrderedDict[Shape, _Captured] = OrderedDict()
        self.padding = Padding()
        self._met: set[Shape] = set()
        self._graphs = GraphPool(runner.device)
        most = self._bucket(max_tokens)
        largest = StepShape(most, max_sequences, max_pages, max_sequences)
        self._names = [name for name in runner.program.inputs if name in FIELDS]
        self.metadata = DecodeBuffer(largest, self._names, runner.device, queue)
        calls = [call for call in runner.program.calls if _asks_for_fresh(call)]
        self._guarded = tuple({call.guard: call for call in calls}.values())  # one of all layers

    @property
    def bytes(self) -> int:
        """Device memory that the captures took, beside weights and caches."""
        return self._graphs.bytes

    def run(
        self, step: Step, fresh: bool, feed: Callable[[torch.Tensor], None] | None = None
    ) -> torch.Tensor | None:
        """Logits [R, V] of a step in the model's type, valid until the next one; None if it is too
        large, or wants more than one row of a sequence.

        Args:
            step: of any kind.
            fresh: as `ProgramRunner.run` has it.
            feed: writes token ids that are on the device alone, given all of them i64[T] there.
        """
        shape = self._shape(step, fresh)
        if shape is None:
            return None
        self.queue.join()
        self.padding.prefill += shape.tokens - len(step.token_ids)
        turn = self.metadata.write(step, self._padded(shape))
        if feed is not None:
            feed(self.metadata.views["token_ids"])
        logits = self._run(shape)
        turn.event, turn.busy = self.queue.record(turn.event), False
        return logits[: len(step.logits_indices)]

    def _run(self, shape: Shape) -> torch.Tensor:
        captured = self.captured.get(shape)
        if captured is None:
            if shape not in self._met or not self._has_time(shape):
                self._met.add(shape)  # what runs is the same, so that tokens are
                return self.runner.run(self._inputs(), fresh=shape.fresh)["logits"]
            begun = self.clock()
            captured = self._capture(shape)
            ended = self.clock()
            self._captures += ended - begun
            self._next = ended + (ended - begun) / _SHARE
            self._keep(shape, captured)
        self.captured.move_to_end(shape)
        self.queue.replay(captured.graph)
        return captured.logits

    def _has_time(self, shape: Shape) -> bool:
        now = self.clock()
        alone = shape.sequences == 1 and self._captures <= _ALONE + _SHARE * (now - self._started)
        return alone or now >= self._next

    def _keep(self, shape: Shape, captured: _Captured) -> None:
        if len(self.captured) >= _MOST:
            if self.runner.device.type == "cuda":
                torch.cuda.synchronize(self.runner.device)  # it may be running
            self.captured.popitem(last=False)
        self.captured[shape] = captured

    def _shape(self, step: Step, fresh: bool) -> Shape | None:
        tokens, count = len(step.token_ids), len(step.seq_lens)
        too_large = tokens > self.max_tokens or count > self.sequences[-1]
        if too_large or len(step.logits_indices) > count:  # all rows, of a text to be scored
            return None
        tokens = self._bucket(tokens)
        count = next(size for size in self.sequences if size >= count)
        rows = count if len(step.logits_indices) else 0
        return Shape(tokens, count, rows, fresh and self._tells(tokens, count, rows))

    def _bucket(self, tokens: int) -> int:
        multiple = _TOKENS if tokens > _TOKENS else _FEW_TOKENS
        return -(-tokens // multiple) * multiple

    def _tells(self, tokens: int, count: int, rows: int) -> bool:
        """Whether a call is made or not because a step is of one new prompt alone."""
        sizes = {"T": tokens, "B": count, "R": rows, "M": self.max_pages}
        known = {**sizes, str(FRESH): 1}
        return any(call.runs_at(known) != call.runs_at(sizes) for call in self._guarded)

    def _padded(self, shape: Shape) -> StepShape:
        return StepShape(shape.tokens, shape.sequences, self.max_pages, shape.rows)

    def _inputs(self) -> dict[str, torch.Tensor]:
        views = self.metadata.views
        return {name: views[name] for name in self._names} | dict(self.caches)

    def _capture(self, shape: Shape) -> _Captured:
        inputs = self._inputs()
        graph, logits = self._graphs.capture(
            lambda: self.runner.run(inputs, fresh=shape.fresh)["logits"]
        )
        return _Captured(graph, logits)


def _asks_for_fresh(call: Call) -> bool:
    return any(str(FRESH) in symbols_of(size) for size in call.guard)

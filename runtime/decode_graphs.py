"""Decode steps as CUDA graphs: one replay a step, one graph a bucket of sequences.

A bucket is captured when it is first met. All graphs share one memory pool, since no two run at
once, and one buffer of metadata, which a single copy fills before each replay. A Program that has
an output "tokens" samples in the graph, which ends by writing the tokens to where the next step
reads its token ids: that step can be queued before the host has seen them.

Steps some of whose sequences share pages (prefix_groups.py) have graphs of their own, in which
attention reads such pages once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..codegen.program import Program
from .batch import DecodeBatch
from .bucketing import Padding
from .decode_buffer import DecodeBuffer, Launched, Turn
from .device_queue import CudaQueue, DeviceQueue, ImmediateQueue
from .graph_pool import GraphPool
from .masked_choice import Captured, MaskedChoice, feed
from .runner import ProgramRunner
from .step import Step, padding_step
from .step_buffer import FEED, FIELDS, GROUPS, SAMPLING, StepShape
from .token_choice import TOKENS, Masks, TokenChooser

_DENSE_UP_TO, _STRIDE = 8, 8  # buckets: 1, 2, 4, 8, 16, 24, 32, …
_PADDING = padding_step([1], 1)
# Ops whose torch functions wait for the device, or copy from the host: no graph can hold them.
_SYNCHRONISE = frozenset(
    {"moe_experts", "cond", "aten", "fused", "dim_value"}
    | {"paged_attention", "scaled_paged_attention", "slot_attention"}
)


@dataclass(frozen=True, slots=True)
class _Open:
    """A launched step whose rows wait for masks."""

    turn: Turn
    captured: Captured
    batch: DecodeBatch


class DecodeGraphs:
    """Graphs of the decode steps of one Program.

    Args:
        runner: of the Program; its weights are on a CUDA device.
        caches: the KV buffers by input name; the graphs hold their addresses.
        max_sequences: the most sequences of a step.
        max_pages: pages of the longest sequence.

    Attributes:
        captured: by bucket.
        shared: by bucket, of steps whose sequences share pages.
        samples: whether the Program does; `launch` needs it.
        chooser: of tokens from other logits.
        padding: what steps have computed to fill their buckets.
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
        self.captured: dict[int, Captured] = {}
        self.shared: dict[int, Captured] = {}
        self.samples = samples(runner.program)
        self.chooser = TokenChooser(runner)
        self.padding = Padding()
        self.queue = self._queue()
        self._graphs = GraphPool(runner.device)
        self._last: Launched | None = None
        self._open: _Open | None = None
        largest = bucket_of(max_sequences)
        self._masked = MaskedChoice(runner, self.chooser, self.queue, self._graphs, largest)
        shape = StepShape(largest, largest, max_pages, largest)
        known = {**FIELDS, **SAMPLING, **GROUPS}
        self._names = [n for n in runner.program.inputs if n in known]
        self.metadata = DecodeBuffer(shape, self._names, runner.device, self.queue)

    @property
    def bytes(self) -> int:
        """Device memory that the captures took, beside weights and caches."""
        return self._graphs.bytes

    def run(self, step: Step) -> torch.Tensor | None:
        """Logits f32[R, V] of a decode step, valid until the next one; None for other steps."""
        count = len(step.seq_lens)
        if not is_decode(step) or count > self.max_sequences:
            return None
        self._last = self._open = None
        self.queue.join()
        shape = self._shape(*step.block_tables.shape)
        self.padding.decode += shape.tokens - count
        turn = self.metadata.write(step, shape)
        captured = self._graph(shape)
        self.queue.replay(captured.graph)
        turn.event, turn.busy = self.queue.record(turn.event), False
        return captured.logits[:count].float()

    def warm_up(self, fewest_sharing: int | None = None, words: int | None = None) -> None:
        """Captures every bucket, so that no request waits for that. The steps for it are of padding
        alone, which writes to page 0.

        Args:
            fewest_sharing: sequences of a step that may share pages; None if no step's do.
            words: of a mask, in 32 bits each, if steps may have rows of a form; None if none do.
        """
        self._last = self._open = None
        buckets = {bucket_of(count) for count in range(1, self.max_sequences + 1)}
        for bucket in sorted(buckets, reverse=True):  # the largest first: others have room in it
            self.queue.join()
            shape = self._shape(bucket, self.max_pages)
            turn = self.metadata.write(_PADDING, shape)
            made = [self._graph(shape)]
            if fewest_sharing is not None and bucket >= fewest_sharing:
                made.append(self._graph(shape, shared=True))
            if words is not None:
                for captured in made:
                    self.queue.replay(captured.graph)
                    self._masked.warm_up(captured, turn, words, self.metadata.views)
            turn.event, turn.busy = self.queue.record(turn.event), False

    def launch(self, batch: DecodeBatch, after: Launched | None) -> Launched:
        """Queues a decode step that samples.

        Args:
            batch: at most max_sequences of them.
            after: the step that samples the batch's tokens, if that is not known yet; nothing has
                been run behind it (`follows`).

        Returns:
            the step; if the batch is held it is open, and waits for `choose`.
        """
        assert after is None or (self.follows(after) and not after.open)
        self._last = self._open = None
        self.queue.join()
        count = len(batch.positions)
        shape = self._shape(count, batch.tables.shape[1])
        self.padding.decode += shape.tokens - count
        turn = self.metadata.fill(batch, shape)
        if after is not None and batch.feed_rows is not None:
            views = self.metadata.views
            (rows,) = FEED
            self.queue.gather(views["token_ids"], after.on_device, views[rows])
        return self._start(turn, shape, batch)

    def choose(self, launched: Launched, masks: Masks) -> None:
        """Queues the sampling of an open step under masks, and closes it. Greedy and random rows
        are chosen as the Program would; those without a mask keep its tokens.

        Args:
            launched: the last step, behind which nothing has been run (`follows`).
            masks: of each sequence what may come next (`Matcher.words`), None for any.
        """
        found = self._open
        assert found is not None and self.follows(launched) and launched.open
        self._last = self._open = None
        self.queue.join()
        captured, params = found.captured, found.batch.params
        if any(mask is not None for mask in masks):
            views = self.metadata.views
            self._masked.choose(captured, found.turn, masks, views, params)
        launched.open = False
        self._end(launched, found.turn)

    def follows(self, launched: Launched) -> bool:
        """Whether the tokens of a launched step still are on the device."""
        return self._last is launched

    def hand_on(self, launched: Launched) -> None:
        """A step of another kind is the last now: the next one goes on with its tokens."""
        self._last, self._open = launched, None

    def _start(self, turn: Turn, shape: StepShape, batch: DecodeBatch) -> Launched:
        captured = self._graph(shape, shared=batch.groups is not None)
        assert captured.tokens is not None
        launched = Launched(turn, len(batch.positions), captured.tokens)
        self.queue.replay(captured.graph)
        if batch.held:
            launched.open = True
            self._open, self._last = _Open(turn, captured, batch), launched
        else:
            self._end(launched, turn)
        return launched

    def _end(self, launched: Launched, turn: Turn) -> None:
        """Queues what brings a step's tokens to the host."""
        turn.bring(self.queue, launched.on_device)
        turn.event, turn.busy = self.queue.record(turn.event), False
        turn.launched = self._last = launched

    def _queue(self) -> DeviceQueue:
        device = self.runner.device
        return CudaQueue(device) if device.type == "cuda" else ImmediateQueue()

    def _shape(self, count: int, pages: int) -> StepShape:
        bucket = bucket_of(count)
        return StepShape(bucket, bucket, self.max_pages, bucket)

    def _graph(self, shape: StepShape, *, shared: bool = False) -> Captured:
        """Of a step of this shape; ``shared`` if it is told of sequences that share pages."""
        known = self.shared if shared else self.captured
        captured = known.get(shape.sequences)
        if captured is None:
            captured = known[shape.sequences] = self._capture(shape, shared)
        return captured

    def _inputs(self) -> dict[str, torch.Tensor]:
        views = self.metadata.views
        return {name: views[name] for name in self._names} | dict(self.caches)

    def _capture(self, shape: StepShape, shared: bool) -> Captured:
        """Runs the step whose metadata is in place once, for libraries to set themselves up, then
        records it.
        """
        inputs = self._inputs()
        self.runner.run(inputs, shared=shared)

        def step() -> tuple[torch.Tensor, torch.Tensor | None]:
            found = self.runner.run(inputs, shared=shared)
            logits, tokens = found["logits"], found.get(TOKENS)
            feed(tokens, inputs)
            return logits, tokens

        graph, (logits, tokens) = self._graphs.capture(step)
        return Captured(graph, logits, tokens)


class EagerDecode(DecodeGraphs):
    """Decode steps on the CPU: nothing is captured, each step runs the Program at its own shape."""

    def _shape(self, count: int, pages: int) -> StepShape:
        return StepShape(count, count, pages, count)

    def _graph(self, shape: StepShape, *, shared: bool = False) -> Captured:
        return _Run(self.runner, self._inputs(), shape, shared).captured


class _Run:
    """Stands for a captured graph: runs the Program and writes to the same tokens every time."""

    def __init__(
        self,
        runner: ProgramRunner,
        inputs: Mapping[str, torch.Tensor],
        shape: StepShape,
        shared: bool,
    ) -> None:
        self.runner, self.inputs, self.shared = runner, inputs, shared
        tokens = torch.zeros(shape.rows, dtype=torch.int64)
        self.captured = Captured(self, torch.empty(0), tokens if samples(runner.program) else None)

    def replay(self) -> None:
        found = self.runner.run(self.inputs, shared=self.shared)
        self.captured.logits = found["logits"]
        if self.captured.tokens is not None:
            self.captured.tokens.copy_(found[TOKENS])
            feed(self.captured.tokens, self.inputs)


def samples(program: Program) -> bool:
    """Whether a Program's steps choose the next tokens themselves."""
    return any(name == TOKENS for name, _ in program.outputs)


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

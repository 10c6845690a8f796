"""The metadata of decode steps: device memory that graphs read, and pinned memory in two turns.

While the device works on one step the host writes the next one's metadata into the other turn, and
only what has changed. A turn is written again when the step that it served is done: its copy to the
device has then been made, and its tokens have come back into it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from .batch import DecodeBatch
from .device_queue import DeviceQueue, Event, Noted
from .params import SamplingParams
from .prefix_groups import PrefixGroups
from .step import Step
from .step_buffer import FEED, Layout, StepShape, write_step

_TURNS = 2
# What float32 and int32 hold; what is beyond draws no other token.
_COLDEST, _HOTTEST, _MOST = 1e-30, 3e38, 2**31 - 1


class Launched:
    """A decode step that is queued or done, whose tokens come into a turn's pinned memory.

    Attributes:
        on_device: i64[bucket], its tokens where the device wrote them; another step may have
            written there since (`DecodeGraphs.follows`).
        open: whether its rows still wait for masks (`DecodeGraphs.choose`).
    """

    __slots__ = ("_array", "_count", "_tokens", "_turn", "on_device", "open")

    def __init__(self, turn: Turn, count: int, on_device: torch.Tensor) -> None:
        self._turn, self._count, self.on_device = turn, count, on_device
        self._tokens: list[int] | None = None
        self.open = False

    def tokens(self) -> list[int]:
        """Waits for the next token of each sequence, -1 where no largest logit was finite."""
        if self._tokens is None:
            assert self._turn.event is not None
            self._turn.event.synchronize()
            self._array = self._turn.numpy_tokens[: self._count].copy()
            self._tokens = self._array.tolist()
        return self._tokens

    def array(self) -> NDArray[np.int64]:
        """`tokens`, as i64[B], which takes less memory."""
        if self._tokens is None:
            self.tokens()
        return self._array


class Turn:
    """Pinned memory for one step's metadata and tokens, with views for the shape it last had."""

    def __init__(self, nbytes: int, rows: int, device: torch.device) -> None:
        self.event: Event | None = None
        self.busy = False  # queued work reads it, and no event says when that ends
        self._device, self._pinned = device, device.type == "cuda"
        pinned = self._pinned
        self.memory = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self.tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=pinned)
        self.come = self.tokens  # the first of them, as many as the step's shape has rows
        self._of: torch.Tensor | None = None  # where these were copied from the last time
        self._noted = Noted()
        self.numpy_tokens = self.tokens.numpy()
        self.launched: Launched | None = None
        self.key: tuple[int, ...] | None = None  # whose parameters it holds
        self.tables = -1  # which block tables it holds
        self.groups: PrefixGroups | None = None  # those that it holds
        self.whole: dict[str, np.ndarray] = {}  # its fields, padding and all
        self.fields: dict[str, np.ndarray] = {}  # those of the sequences
        self.pieces: dict[tuple[str, bool], tuple[torch.Tensor, torch.Tensor, Noted]] = {}
        self._shape: StepShape | None = None
        self._count = 0
        self._words: torch.Tensor | None = None

    def __del__(self) -> None:
        # What goes to the driver directly (`CudaQueue.copy`) torch knows nothing of: it would give
        # this memory to somebody else while a copy is on its way.
        if not self._pinned or sys.is_finalizing():
            return
        if self.busy:
            torch.cuda.synchronize(self._device)
        elif self.event is not None:
            self.event.synchronize()

    def bring(self, queue: DeviceQueue, on_device: torch.Tensor) -> None:
        """Queues the copy of its step's tokens i64[rows of the shape]."""
        if self._of is not on_device:
            self._of, self._noted = on_device, Noted()
        queue.copy(self.come, on_device, self._noted)

    def words(self, width: int) -> torch.Tensor:
        """Memory i32[rows, width] for the masks of its step, made when it is first asked for; to be
        written like all else here.
        """
        if self._words is None:
            size = (len(self.tokens), width)
            self._words = torch.zeros(size, dtype=torch.int32, pin_memory=self._pinned)
        return self._words

    def wait(self, queue: DeviceQueue) -> None:
        """Returns when nothing queued reads or writes this memory, and its tokens are taken."""
        if self.busy:
            self.event, self.busy = queue.record(self.event), False
        if self.launched is not None:
            self.launched.tokens()
            self.launched = None
        elif self.event is not None:
            self.event.synchronize()

    def shaped(self, shape: StepShape, count: int, layout: Layout) -> None:
        """Makes the views of `count` sequences, and clears the padding, if these are new."""
        if self._shape == shape and self._count == count:
            return
        self.pieces.clear()
        self._shape, self.key, self.tables, self.groups = None, None, -1, None
        # By this thread: torch calls all cores up for so many bytes, which takes longer.
        self.memory.numpy()[: layout.nbytes].fill(0)
        self.whole = {name: view.numpy() for name, view in layout.views(self.memory).items()}
        self.fields = {name: view[:count] for name, view in self.whole.items()}
        if "top_p" in self.whole:
            self.whole["top_p"].fill(1)
        self._shape, self._count = shape, count
        self.come, self._of = self.tokens[: shape.rows], None


class DecodeBuffer:
    """Metadata of decode steps of any shape up to a largest one.

    Args:
        largest: the shape that memory is made for.
        names: the fields that the Program takes.
        device: where the Program runs.
        queue: of the device.
    """

    def __init__(
        self, largest: StepShape, names: Iterable[str], device: torch.device, queue: DeviceQueue
    ) -> None:
        self.names, self.queue = (*names, *FEED), queue
        nbytes = Layout.of(largest, self.names).nbytes
        self.device = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._turns = [Turn(nbytes, largest.rows, device) for _ in range(_TURNS)]
        self._used = 0
        self._shape: StepShape | None = None
        self._tables = -1  # which block tables the device holds, in the layout of _shape

    def fill(self, batch: DecodeBatch, shape: StepShape) -> Turn:
        """Writes a batch, padded to the shape, by one copy of what the device does not have yet."""
        turn = self._next(shape, len(batch.positions))
        fields = turn.fields
        # What is half written when an exception comes is not held.
        if turn.key is not batch.key and turn.key != batch.key:
            turn.key = None
            write_params(fields, batch.params)
            turn.key = batch.key
        if turn.tables != batch.tables_version:
            known, turn.tables = turn.tables, -1
            batch.bring(fields["block_tables"], known)
            turn.tables = batch.tables_version
        if batch.groups is not None and turn.groups is not batch.groups:
            turn.groups, groups = None, batch.groups
            fields["group_rows"][:] = groups.rows
            fields["group_ids"][:] = groups.ids
            fields["shared_pages"][:] = groups.pages
            turn.groups = groups
        fields["positions"][:] = batch.positions
        fields["seq_lens"][:] = np.add(batch.positions, 1) if batch.ends is None else batch.ends
        if batch.gaps is not None:
            fields["seq_lens"] -= np.asarray(batch.gaps, dtype=np.int32)
        fields["slot_mapping"][:] = batch.slots
        if batch.uniform is not None:
            fields["uniform"][:] = batch.uniform
        if batch.feed_rows is not None:
            fields["feed_rows"][:] = batch.feed_rows
        elif batch.token_ids is not None:
            fields["token_ids"][:] = batch.token_ids
        first = "token_ids" if batch.token_ids is not None else next(iter(FEED))
        self._send(turn, first, whole=self._tables != batch.tables_version)
        self._tables = batch.tables_version
        return turn

    def write(self, step: Step, shape: StepShape) -> Turn:
        """Writes a step of the scheduler's, whose rows are sampled greedily, by one copy."""
        turn = self._next(shape, len(step.seq_lens))
        turn.key, turn.tables, self._tables = None, -1, -1
        write_step(step, turn.whole)
        if "temperature" in turn.whole:
            turn.whole["temperature"].fill(0)
        self._send(turn, "token_ids", whole=True)
        return turn

    def _next(self, shape: StepShape, count: int) -> Turn:
        self._used = (self._used + 1) % _TURNS
        turn = self._turns[self._used]
        turn.wait(self.queue)
        if self._shape != shape:
            self._shape, self._tables = None, -1
            self._layout = Layout.of(shape, self.names)
            self.views = self._layout.views(self.device)
            self._shape = shape
        turn.shaped(shape, count, self._layout)
        return turn

    def _send(self, turn: Turn, first: str, *, whole: bool) -> None:
        pieces = turn.pieces.get((first, whole))
        if pieces is None:
            places = self._layout.places
            start = places[first][0]
            stop = self._layout.nbytes if whole else places["block_tables"][0]
            pieces = self.device[start:stop], turn.memory[start:stop], Noted()
            turn.pieces[first, whole] = pieces
        turn.busy = True
        self.queue.copy(*pieces)


def write_params(fields: Mapping[str, np.ndarray], params: list[SamplingParams]) -> None:
    """Writes how each row is sampled, but for its random number (`step_buffer.SAMPLING`)."""
    fields["temperature"][:] = [min(max(p.temperature, _COLDEST), _HOTTEST) for p in params]
    fields["temperature"][[p.is_greedy for p in params]] = 0
    fields["top_k"][:] = [min(p.top_k, _MOST) for p in params]
    fields["top_p"][:] = [p.top_p for p in params]
    fields["min_p"][:] = [p.min_p for p in params]

"""Steps of any kind sample their next tokens on the device: what that takes beside the Program.

A decode step's Program ends by sampling. Others end with logits, of as many rows as sequences
complete, which the decode step's way of sampling takes too (`token_choice.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .batch import MixedBatch
from .decode_buffer import Launched, Turn, write_params
from .device_queue import DeviceQueue
from .step_buffer import FEED, SAMPLING, Layout, StepShape
from .token_choice import TokenChooser

_TURNS = 2  # one is written while the device reads the other


class RowSampler:
    """Samples the rows of a step's logits, and feeds it the tokens that the one before sampled.

    Args:
        most: rows of a step.
        device: where its logits are.
        queue: of the device, shared with whatever else runs on it.
        mode: that logits may be used in.
        chooser: of tokens.
    """

    def __init__(
        self,
        most: int,
        device: torch.device,
        queue: DeviceQueue,
        mode: Callable[[], AbstractContextManager[object]],
        chooser: TokenChooser,
    ) -> None:
        self._queue, self._mode, self._most, self._chooser = queue, mode, most, chooser
        self._shape = StepShape(1, most, 1, most)
        self._layout = Layout.of(self._shape, (*SAMPLING, *FEED))
        nbytes = self._layout.nbytes
        self._memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._fields = self._layout.views(self._memory)
        self._tokens = torch.zeros(most, dtype=torch.int64, device=device)
        self._turns = [Turn(nbytes, most, device) for _ in range(_TURNS)]

    def launch(
        self,
        batch: MixedBatch,
        after: Launched | None,
        run: Callable[[Callable[[Tensor], None] | None], Tensor],
    ) -> Launched:
        """Queues a step, and what brings its tokens to the host.

        Args:
            batch: of at most `most` rows.
            after: the step that samples the batch's first tokens, if they are not known.
            run: queues the step and gives its logits [R, V]; what it is given writes the tokens
                in flight into the step's token ids i64[T] on the device.
        """
        turn = self._fill(batch)

        def work() -> None:
            feed = None
            if after is not None and batch.feed_rows:

                def feed(token_ids: Tensor) -> None:
                    self._feed(token_ids, after.on_device, len(batch.feed_rows))

            with self._mode():
                self._sample(run(feed), batch)

        self._queue.run(work)
        launched = Launched(turn, len(batch.key), self._tokens)
        self._queue.copy(turn.tokens, self._tokens)
        turn.event, turn.busy = self._queue.record(turn.event), False
        turn.launched = launched
        return launched

    def _fill(self, batch: MixedBatch) -> Turn:
        self._turns.append(self._turns.pop(0))
        turn = self._turns[-1]
        turn.wait(self._queue)
        turn.shaped(self._shape, self._most, self._layout)
        count, fields = len(batch.key), turn.whole
        write_params({name: fields[name][:count] for name in SAMPLING}, batch.params)
        fields["uniform"][:count] = batch.uniform
        (rows,) = FEED
        fields[rows][: len(batch.feed_rows)] = batch.feed_rows
        turn.busy = True
        self._queue.copy(self._memory, turn.memory)
        return turn

    def _feed(self, token_ids: Tensor, sampled: Tensor, count: int) -> None:
        # -1, of broken logits, would be read outside of the embedding.
        (rows,) = FEED
        found = sampled.index_select(0, self._fields[rows][:count]).clamp_(min=0)
        token_ids[:count].copy_(found)

    def _sample(self, logits: Tensor, batch: MixedBatch) -> None:
        count = len(batch.key)
        if count:
            given = {name: self._fields[name][:count] for name in SAMPLING}
            self._tokens[:count].copy_(self._chooser.choose(logits, given, batch.params))

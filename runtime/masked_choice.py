"""The sampling of a decode step's rows under masks: a copy of these, and a replay behind the step.

What a mask lets come follows from the token before, so that it is known only while the device
computes the step. What is left for the device when it has the logits does not depend on which rows
have a mask: those without one keep the token that the step has sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .decode_buffer import Turn
from .device_queue import DeviceQueue, Replayable
from .grammar import fill_masks
from .graph_pool import GraphPool
from .params import SamplingParams
from .runner import ProgramRunner
from .token_choice import Masks, TokenChooser


@dataclass(slots=True)
class Captured:
    """A decode step of some bucket.

    Attributes:
        graph: of the step.
        logits: [bucket, V] in the model's type, written by each replay.
        tokens: i64[bucket], the same; None if the Program does not sample.
        choice: of the sampling under masks; None as long as that has not been captured.
    """

    graph: Replayable
    logits: torch.Tensor
    tokens: torch.Tensor | None
    choice: Replayable | None = None


class MaskedChoice:
    """Queues such samplings. On a GPU the first of a bucket is run as it is, then captured, unless
    ``warm_up`` has done so.

    Args:
        runner: of the Program that samples.
        chooser: of its tokens.
        queue: of the device.
        graphs: where captures go.
        rows: the most of a step.
    """

    def __init__(
        self,
        runner: ProgramRunner,
        chooser: TokenChooser,
        queue: DeviceQueue,
        graphs: GraphPool,
        rows: int,
    ) -> None:
        self._runner, self._chooser, self._queue, self._graphs = runner, chooser, queue, graphs
        self._rows = rows
        self._words: torch.Tensor | None = None  # i32[rows, W], of the step that is next

    def warm_up(
        self, captured: Captured, turn: Turn, width: int, fields: Mapping[str, torch.Tensor]
    ) -> None:
        """Captures the sampling of a step that is queued, so that none with a form waits for that;
        where no graph can hold it, there is nothing to do.

        Args:
            captured, turn, fields: as ``choose`` has them; the step is of padding alone.
            width: words of a mask.
        """
        if captured.choice is None and self._holds(captured):
            anything = np.full(width, -1, dtype=np.int32)
            self.choose(captured, turn, [anything], fields, [SamplingParams()])

    def choose(
        self,
        captured: Captured,
        turn: Turn,
        masks: Masks,
        fields: Mapping[str, torch.Tensor],
        params: Sequence[SamplingParams],
    ) -> None:
        """Queues the sampling of a step that is queued.

        Args:
            captured: the step; its tokens are written.
            turn: of the step.
            masks: of its sequences, one at least; rows behind them are padding.
            fields: the step's metadata on the device, of which the token ids are written.
            params: of its sequences.
        """
        tokens = captured.tokens
        assert tokens is not None
        words = self._send(turn, masks, len(tokens))

        def work() -> None:
            with self._runner.mode():  # a capture's tensors may be written in no other
                self._chooser.choose_masked(captured.logits, tokens, words, fields, params)
                feed(tokens, fields)

        if captured.choice is not None:
            self._queue.replay(captured.choice)
            return
        self._queue.run(work)
        if self._holds(captured):
            captured.choice, _ = self._graphs.capture(work)

    def _holds(self, captured: Captured) -> bool:
        """Whether a graph can hold the sampling."""
        on_gpu = self._runner.device.type == "cuda"
        return on_gpu and captured.tokens is not None and self._chooser.captures(captured.logits)

    def _send(self, turn: Turn, masks: Masks, rows: int) -> torch.Tensor:
        width = max([len(mask) for mask in masks if mask is not None])
        if self._words is None:
            size = (self._rows, width)
            self._words = torch.zeros(size, dtype=torch.int32, device=self._runner.device)
        assert self._words.shape[1] == width  # all are of one vocabulary
        written = turn.words(width)[:rows]
        turn.busy = True
        fill_masks(masks, written.numpy())
        words = self._words[:rows]
        self._queue.copy(words, written)
        return words


def feed(tokens: torch.Tensor | None, inputs: Mapping[str, torch.Tensor]) -> None:
    """Makes the tokens the next step's. -1, of logits that are not finite, would be read outside of
    the embedding before the host could refuse it.
    """
    if tokens is not None:
        torch.clamp(tokens, min=0, out=inputs["token_ids"])

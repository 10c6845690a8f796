"""Steps that sample on the device: one is in flight while the host works.

The path of one step, n, when nothing keeps it from being launched ahead:

1. While the device computes step n - 1, `Scheduler.schedule_ahead` plans n: one more token of each
   sequence that goes on whatever n - 1 samples, and prompts, or chunks of them, beside. Places in
   the KV memory, positions and lengths are known; the token ids of those that go on are what n - 1
   samples, and stay on the device.
2. `Launcher.launch` builds the batch, which draws the random numbers. The executor writes it into
   the pinned memory that n - 2 had, and queues: the copy to the device; a gather of the token ids,
   if the rows are not those of n - 1; the graph, which ends by sampling and feeding the tokens to
   the next step; the copy of the tokens to the host; an event. Nothing waits. A step with a prompt
   in it is run by the Program that takes any, and sampled beside it (`row_sampling.py`).
3. The loop waits for the event of n - 1, and commits its tokens. A sequence that has ended (end of
   sequence, stop token, stop string) is dropped: its row of n is void. A prompt whose logits were
   numbers is shared.
4. The next call of `GenerationLoop.step` launches n + 1, and then waits for n.

Rows of a form need a mask, which follows from the token before: such a step is launched without
it, as far as its logits. When the tokens of n - 1 have been committed, the masks for n are computed
while the device computes its logits; then the sampling is queued (`Launcher.choose`), and n + 1
behind it, before n is waited for. So the device has work as long as a step takes longer than
committing tokens and computing masks. A run of forced tokens makes the loop drain, and is computed
as one chunk.

`schedule_ahead` declines, and the loop commits n - 1 before it plans n from what is known (it
drains), when a request waits for the place of one that ends, pages run short (so that somebody has
to be preempted), a row needs the host's sampler (penalties, logprobs, stop tokens masked), there is
a form or a fork beside a prompt, or other work has taken the tokens' place on the device. Forks
follow prompts, so that they come when nothing is in flight.

Why a void row does no harm. `Sequence.in_flight` counts the tokens on their way; whatever drops or
preempts a sequence sets it to 0, and a row without it, or of before a preemption, is never
committed. The row's sequence reserved the place that it writes to, after copy-on-write: no other
sequence holds that page when the step is launched. Once the sequence is dropped, the page may go to
another, but all work is queued in one order, so the new owner's steps and page copies come later,
and a sequence reads no place that it, or whoever it was forked from, has not written since it got
the page. Were the page kept for its contents, they would be right: the void row writes K and V of
the sequence's own last token, at that token's place. Padding rows write to slot 0, in the reserved
page 0.

What is in flight when an exception comes is discarded, not committed: every running sequence starts
anew from its committed tokens. Its random numbers are numbered by token, so it draws the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from .batch import DecodeBatch, DecodeBatches, MixedBatch, build_mixed
from .decode_buffer import Launched
from .failing import broken_logits, end_request
from .grammar import prepare
from .pool import KVPool
from .sampling import Sampled
from .scheduler import Chunk, Plan, Scheduler, samples_anywhere
from .step import StepExecutor
from .token_choice import Masks


class SamplingExecutor(StepExecutor, Protocol):
    """An executor whose decode steps sample: `capabilities.samples` is above 0."""

    def launch(self, batch: DecodeBatch, after: Launched | None) -> Launched:
        """Queues a step of at most `capabilities.samples` sequences, and does not wait for it.

        Args:
            batch: what to compute.
            after: the step that samples the batch's tokens, unless it holds them itself.
        """
        ...

    def launch_mixed(self, batch: MixedBatch, after: Launched | None) -> Launched:
        """`launch` for a step of any kind, of at most `capabilities.samples_mixed` rows."""
        ...

    def choose(self, launched: Launched, masks: Masks) -> None:
        """Queues the sampling of an open step under the masks of its sequences."""
        ...

    def follows(self, launched: Launched) -> bool:
        """Whether a step can be launched `after` this one."""
        ...


class _Share:
    """What a step computes of one sequence.

    Attributes:
        chunk: of the sequence's tokens.
        samples: whether its next token is sampled behind them.
    """

    __slots__ = ("_preemptions", "chunk", "samples")

    def __init__(self, chunk: Chunk) -> None:
        self.chunk, self.samples = chunk, chunk.completes
        self._preemptions = chunk.seq.timings.preemptions

    @property
    def is_void(self) -> bool:
        """Whether nobody waits for it any more."""
        seq = self.chunk.seq
        if seq.finish_reason is not None or seq.timings.preemptions != self._preemptions:
            return True
        return self.samples and not seq.in_flight

    @property
    def ends_prompt(self) -> bool:
        """Whether the sequence's prompt is computed then, and was not before."""
        start, length = self.chunk.start, len(self.chunk.seq.request.prompt)
        return start < length <= start + len(self.chunk.slots)


class InFlight:
    """A step that has been launched, and whose tokens are not committed.

    Args:
        plan: of the step, whose sequences do not count it yet.
        batch, launched: what has been made of it.
    """

    __slots__ = ("batch", "launched", "plan", "shares")

    def __init__(self, plan: Plan, batch: DecodeBatch | MixedBatch, launched: Launched) -> None:
        self.plan, self.batch, self.launched = plan, batch, launched
        self.shares = [_Share(chunk) for chunk in plan.chunks]
        for share in self.shares:
            seq = share.chunk.seq
            seq.num_computed += len(share.chunk.slots)
            seq.in_flight += share.samples

    @property
    def is_void(self) -> bool:
        """Whether nobody waits for it any more."""
        return all([share.is_void for share in self.shares])

    @property
    def num_tokens(self) -> int:
        """How many it computes."""
        return sum([len(chunk.slots) for chunk in self.plan.chunks])


class Launcher:
    """Launches and commits steps that sample.

    Args:
        executor: takes them.
        scheduler: plans them; sequences that end are dropped there.
        pool: of the scheduler.
        clock: seconds, for the times of tokens.
    """

    def __init__(
        self,
        executor: SamplingExecutor,
        scheduler: Scheduler,
        pool: KVPool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._executor, self._scheduler, self._clock = executor, scheduler, clock
        self._pool, self._batches = pool, DecodeBatches(pool)
        self._capabilities = executor.capabilities

    def takes(self, plan: Plan) -> bool:
        """Whether a step can sample all that a plan completes; to be asked of all plans."""
        if self._decodes(plan):
            return True
        self._batches.forget()
        takes = len(plan.chunks) <= self._capabilities.samples_mixed
        return takes and all([samples_anywhere(chunk.seq) for chunk in plan.chunks])

    def _decodes(self, plan: Plan) -> bool:
        """Whether a plan is of decodes alone that a decode step can sample."""
        return len(plan.chunks) <= self._capabilities.samples and all(map(_samples, plan.chunks))

    def forget(self) -> None:
        """To be called when pages may have changed hands other than by plans."""
        self._batches.forget()

    def plan_ahead(self, flight: InFlight) -> Plan | None:
        """The plan of a step to be launched behind one in flight; None if there can be none."""
        if not self._executor.follows(flight.launched):
            return None
        return self._scheduler.schedule_ahead()

    def launch(self, plan: Plan, after: InFlight | None) -> InFlight:
        """Launches a plan whose page copies are queued.

        Args:
            plan: that `takes` accepts, or from `plan_ahead`.
            after: the step in flight, if the plan was made ahead.
        """
        before = None if after is None else after.batch
        behind = None if after is None else after.launched
        behind_all = after is None or all([chunk.seq.in_flight for chunk in plan.chunks])
        if behind_all and self._decodes(plan):
            batch = self._batches.build(plan, before)
            return InFlight(plan, batch, self._executor.launch(batch, behind))
        self._batches.forget()
        mixed = build_mixed(plan, self._pool, before)
        return InFlight(plan, mixed, self._executor.launch_mixed(mixed, behind))

    def choose(self, flight: InFlight) -> bool:
        """Computes the masks of an open step, while the device computes its logits, and queues the
        sampling.

        Returns:
            False if other work has taken the logits' place.
        """
        if not self._executor.follows(flight.launched):
            return False
        states = [
            chunk.seq.sampling if chunk.seq.in_flight else None for chunk in flight.plan.chunks
        ]
        prepare([s.matcher for s in states if s is not None and s.matcher is not None])
        masks = [None if state is None else state.mask() for state in states]
        self._executor.choose(flight.launched, masks)
        return True

    def commit(self, flight: InFlight) -> tuple[list[Chunk], int]:
        """Waits for a step's tokens and gives them to their sequences. A row without a finite
        largest logit, if it is not void, ends its request.

        Returns:
            what of the plan was computed for somebody, and how many tokens it sampled.
        """
        tokens = iter(flight.launched.tokens())
        shares = [
            (share, next(tokens) if share.samples else None, share.is_void)
            for share in flight.shares
        ]
        done: list[Chunk] = []
        sampled, now = 0, self._clock()
        for share, token, is_void in shares:
            if is_void:
                continue
            done.append(share.chunk)
            if token is not None:
                sampled += 1
                self._give(share, token, now)
        return done, sampled

    def _give(self, share: _Share, token: int, now: float) -> None:
        seq = share.chunk.seq
        if token < 0:
            end_request(self._scheduler, seq.request, broken_logits(seq.request))
        if seq.finish_reason is not None:  # its sibling's row may have ended it
            return
        seq.in_flight -= 1
        if seq.sampling.matcher is None:
            seq.take(token, now)
        else:
            seq.accept(Sampled(token), now)
        if seq.finish_reason is not None:
            self._scheduler.drop(seq)
        elif share.ends_prompt:
            self._scheduler.share(seq)


def _samples(chunk: Chunk) -> bool:
    seq = chunk.seq
    decodes = len(chunk.slots) == 1 and chunk.completes and seq.request.forked
    return decodes and seq.sampling.samples_in_step

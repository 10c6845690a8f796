"""Steps that sample on the device: one is in flight while the host works.

The path of one step, n, when nothing keeps it from being launched ahead:

1. While the device computes step n - 1, `Scheduler.schedule_ahead` plans n: one more token of each
   sequence that goes on whatever n - 1 samples, and prompts, or chunks of them, beside. Places in
   the KV memory, positions and lengths are known; the token ids of those that go on are what n - 1
   samples, and stay on the device. As long as all that run go on they are the same `Decodes`, whose
   positions, places, random numbers and batch are arrays: nothing is looked up for each sequence.
2. `Launcher.launch` builds the batch, which draws the random numbers. The executor writes it into
   the pinned memory that n - 2 had, and queues: the copy to the device; a gather of the token ids,
   if the rows are not those of n - 1; the graph, which ends by sampling and feeding the tokens to
   the next step; the copy of the tokens to the host; an event. Nothing waits. A step with a prompt
   in it is run by the Program that takes any, and sampled beside it (`row_sampling.py`).
3. The loop waits for the event of n - 1, and commits its tokens. Those that decode note theirs
   (`note_each`); only where somebody waits for the text, or the token may be the last, is the
   sequence told of it. Where the rows of n are the same, and nobody waits, the tokens of all are
   noted by one statement, and sequences take them when somebody asks (`lag.py`). One that has
   ended (end of sequence, stop token, stop string) is dropped: its row of n is void. A prompt
   whose logits were numbers is shared.
4. The next call of `GenerationLoop.step` launches n + 1, and then waits for n.

Rows of a form need a mask, which follows from the token before: such a step is launched without
it, as far as its logits. When the tokens of n - 1 have been committed, the masks for n are computed
while the device computes its logits; then the sampling is queued (`Launcher.choose`,
`masked_choice.py`), and n + 1 behind it, before n is waited for. So the device has work as long as
a step takes longer than committing tokens and computing masks. A run of forced tokens makes the
loop drain, and is computed as one chunk.

`schedule_ahead` declines, and the loop commits n - 1 before it plans n from what is known (it
drains), when a request waits for the place of one that ends, pages run short (so that somebody has
to be preempted), a row needs the host's sampler (penalties, logprobs, stop tokens masked), there is
a form or a fork beside a prompt, or other work has taken the tokens' place on the device. Forks
follow prompts, so that they come when nothing is in flight.

Why a void row does no harm. `Sequence.in_flight` counts the tokens on their way; whatever drops or
preempts a sequence sets it to 0, and a row without it, or of before a preemption, is never
committed. All of that goes through `Scheduler.drop`, which counts: if nobody has been dropped since
a step was launched, none of its rows is looked at. `drop`, and whoever joins or forks, also ends
`Decodes` that would have served the next step.

The row's sequence reserved the place that it writes to, after copy-on-write: no other sequence
holds that page when the step is launched. Once the sequence is dropped, the page may go to another,
but all work is queued in one order, so the new owner's steps and page copies come later, and a
sequence reads no place that it, or whoever it was forked from, has not written since it got the
page. Were the page kept for its contents, they would be right: the void row writes K and V of the
sequence's own last token, at that token's place. Padding rows write to slot 0, in the reserved
page 0.

What is in flight when an exception comes is discarded, not committed: every running sequence starts
anew from its committed tokens, and is told of the last one, if the exception came before that. Its
random numbers are numbered by token, so it draws the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Protocol

from ..errors import TilewrightError
from .batch import DecodeBatch, DecodeBatches, MixedBatch, build_mixed
from .decode_buffer import Launched
from .decodes import Decodes
from .done import Done
from .failing import broken_logits, end_request
from .grammar import prepare
from .plan import Chunk, Plan
from .pool import KVPool
from .request import Request, Sequence, launch_each, note_each
from .sampling import Sampled
from .scheduler import Scheduler, samples_anywhere
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
    """What a step computes of one sequence beside those that decode.

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
        return _is_void(seq, self._preemptions) or (self.samples and not seq.in_flight)

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
        scheduler: of the plan.
    """

    __slots__ = ("_drops", "_scheduler", "batch", "launched", "plan", "shares")

    def __init__(
        self,
        plan: Plan,
        batch: DecodeBatch | MixedBatch,
        launched: Launched,
        scheduler: Scheduler,
    ) -> None:
        self.plan, self.batch, self.launched = plan, batch, launched
        self._scheduler, self._drops = scheduler, scheduler.num_drops
        if plan.decodes is not None:
            lag = plan.decodes.lag
            if lag is None:
                launch_each(plan.decodes.seqs)
            else:
                lag.launch()
        self.shares = [_Share(chunk) for chunk in plan.beside]
        for share in self.shares:
            seq = share.chunk.seq
            seq.num_computed += len(share.chunk.slots)
            seq.in_flight += share.samples

    @property
    def is_void(self) -> bool:
        """Whether nobody waits for it any more."""
        decodes = self.plan.decodes
        if decodes is not None and self._drops == self._scheduler.num_drops:
            return False
        if decodes is not None and len(self.void_rows()) < len(decodes.seqs):
            return False
        return all([share.is_void for share in self.shares])

    @property
    def num_tokens(self) -> int:
        """How many it computes."""
        return self.plan.num_tokens

    def void_rows(self) -> Collection[int]:
        """The rows of its decodes that nobody waits for any more."""
        decodes = self.plan.decodes
        if decodes is None or self._drops == self._scheduler.num_drops:
            return ()
        pairs = zip(decodes.seqs, decodes.preemptions, strict=True)
        return {
            row
            for row, (seq, preemptions) in enumerate(pairs)
            if not seq.in_flight or _is_void(seq, preemptions)
        }


def _is_void(seq: Sequence, preemptions: int) -> bool:
    """Whether a sequence has ended, or started anew since it was preempted so often."""
    return seq.finish_reason is not None or seq.timings.preemptions != preemptions


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
        self._pool = pool
        self._batches = DecodeBatches(pool, executor.capabilities.shared_tokens)
        self._capabilities = executor.capabilities
        self._last: InFlight | None = None  # what was launched last, until it is committed
        self._committed: InFlight | None = None
        # Of a launch that was given up, and the steps whose numbers it has spoilt.
        self._given_up: tuple[TilewrightError, tuple[InFlight | None, ...]] | None = None

    def takes(self, plan: Plan) -> bool:
        """Whether a step can sample all that a plan completes; to be asked of all plans."""
        if self._decodes(plan):
            return True
        self._batches.forget()
        takes = plan.num_sequences <= self._capabilities.samples_mixed
        return takes and all([samples_anywhere(chunk.seq) for chunk in plan.beside])

    def _decodes(self, plan: Plan) -> bool:
        """Whether a plan is of decodes alone that a decode step can sample."""
        if plan.num_sequences > self._capabilities.samples:
            return False
        if not plan.beside:
            return True
        # Who decodes behind a step in flight has been looked at when that was planned.
        return plan.decodes is None and all(map(_samples, plan.beside))

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
        self._last = self._launch(plan, after)
        return self._last

    def _launch(self, plan: Plan, after: InFlight | None) -> InFlight:
        before = None if after is None else after.batch
        behind = None if after is None else after.launched
        behind_all = after is None or not plan.beside
        if behind_all and self._decodes(plan):
            if not plan.decodes:  # one may have been preempted and let in again, on other pages
                self._batches.forget()
            batch = self._batches.build(plan if plan.decodes else plan.gathered(), before)
            return InFlight(plan, batch, self._executor.launch(batch, behind), self._scheduler)
        self._batches.forget()
        mixed = build_mixed(plan, self._pool, before)
        launched = self._executor.launch_mixed(mixed, behind)
        return InFlight(plan, mixed, launched, self._scheduler)

    def choose(self, flight: InFlight) -> bool:
        """Computes the masks of an open step, while the device computes its logits, and queues the
        sampling.

        Returns:
            False if other work has taken the logits' place.
        """
        if not self._executor.follows(flight.launched):
            return False
        states = [seq.sampling if seq.in_flight else None for seq in flight.plan.seqs]
        prepare([s.matcher for s in states if s is not None and s.matcher is not None])
        masks = [None if state is None else state.mask() for state in states]
        self._executor.choose(flight.launched, masks)
        return True

    def commit(self, flight: InFlight) -> Done:
        """Waits for a step's tokens and gives them to their sequences. A row without a finite
        largest logit, if it is not void, ends its request.

        Returns:
            what of the plan was computed for somebody.
        """
        tokens = flight.launched.tokens()
        now = self._clock()
        self._committed = flight
        if self._last is flight:
            self._last = None
        count = len(flight.plan.positions)
        void = flight.void_rows()
        rest = iter(tokens[count:])
        shares = [
            (share, next(rest) if share.samples else None, share.is_void) for share in flight.shares
        ]
        if count:
            self._give_each(flight, tokens[:count] if flight.shares else tokens, void, now)
        beside: list[Chunk] = []
        sampled = 0
        for share, token, is_void in shares:
            if is_void:
                continue
            beside.append(share.chunk)
            if token is not None:
                sampled += 1
                self._give(share.chunk.seq, token, now)
                if share.ends_prompt and share.chunk.seq.finish_reason is None:
                    self._scheduler.share(share.chunk.seq)
        return Done(flight.plan, void, beside, sampled)

    def _give_each(
        self, flight: InFlight, tokens: list[int], void: Collection[int], now: float
    ) -> None:
        """Gives those that decode their tokens: a statement each only where something is to be said
        or may have ended.
        """
        plan, decodes = flight.plan, flight.plan.decodes
        assert decodes is not None
        seqs = decodes.seqs
        marked = not decodes.marks.isdisjoint(tokens)
        if void or decodes.held or (marked and min(tokens) < 0):
            for row, (seq, token) in enumerate(zip(seqs, tokens, strict=True)):
                if row not in void:
                    seq.num_reached = len(seq.tokens)
                    self._give(seq, token, now)
            return
        lag = decodes.lag
        if lag is None:
            note_each(seqs, tokens, now)
        else:
            lag.note(flight.launched.array()[: len(seqs)], now)
        told = decodes.loud
        if plan.fills or marked:
            stops = decodes.stop_ids
            ends = [row for row, token in enumerate(tokens) if token in stops]
            told = sorted({*told, *ends, *decodes.full(plan.positions)})
        for row in told:
            seq = seqs[row]
            seq.tell()
            if seq.finish_reason is not None:
                self._scheduler.drop(seq)
        if lag is None and decodes.lags and self._goes_on(decodes):
            decodes.begin_lag(now)

    def _goes_on(self, decodes: Decodes) -> bool:
        """Whether nothing but a step of the same rows is in flight, once one is committed."""
        last = self._last
        return (
            self._scheduler.going is decodes and last is not None and last.plan.decodes is decodes
        )

    def _broken(self, request: Request) -> TilewrightError:
        """Why a row of the step that is committed has no finite largest logit. A launch that was
        given up is the reason of all its rows, and of those of a step that was queued behind it.
        """
        if self._given_up is None or self._committed not in self._given_up[1]:
            error = self._executor.recover()
            if error is None:
                return broken_logits(request)
            self._given_up = (error, (self._committed, self._last))
        return self._given_up[0]

    def _give(self, seq: Sequence, token: int, now: float) -> None:
        if token < 0:
            end_request(self._scheduler, seq.request, self._broken(seq.request))
        if seq.finish_reason is not None:  # its sibling's row may have ended it
            return
        seq.in_flight -= 1
        if seq.sampling.matcher is None:
            seq.take(token, now)
        else:
            seq.accept(Sampled(token), now)
        if seq.finish_reason is not None:
            self._scheduler.drop(seq)


def _samples(chunk: Chunk) -> bool:
    seq = chunk.seq
    decodes = len(chunk.slots) == 1 and chunk.completes and seq.request.forked
    return decodes and seq.sampling.samples_in_step

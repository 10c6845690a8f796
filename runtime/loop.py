"""The step loop: plan, build, run, sample, stop, until every request has ended.

A step either runs from plan to tokens, or is launched, and the next one with it, before its tokens
are waited for: in_flight.py has the path of such a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import RLock
from typing import Protocol, cast

import torch
from torch import Tensor

from ..errors import UnsupportedError, VerificationError
from .batch import build_step
from .counters import Counters
from .done import Done
from .failing import broken_logits, end_request
from .grammar import Grammars, Matcher
from .in_flight import InFlight, Launcher, SamplingExecutor
from .intake import (
    check_prompt,
    check_stop_strings,
    check_streamed,
    check_structured,
    check_tokens,
    params_for,
)
from .observer import Guest, Observer
from .output import Completion, Delta
from .params import SamplingParams
from .plan import Plan
from .pool import KVPool
from .prompt_logprobs import token_logprobs
from .request import Request
from .request import Sequence as RunningSequence
from .sampling import BROKEN, Sampler
from .scheduler import Scheduler
from .step import StepExecutor
from .stopping import StreamDecoder


class StreamingTokenizer(Protocol):
    """What the loop needs of a tokenizer (formats/tokenizer.py has the real one)."""

    def stream(self) -> StreamDecoder:
        """A decoder for one sequence."""
        ...


class GenerationLoop:
    """Runs any number of requests over one executor, batched at token boundaries.

    Calls may be interleaved (a `stream` that is half read, then a `generate`), and come from
    several threads: they share the steps, one at a time.

    Args:
        executor: runs the steps; its KV buffers are made here, as large as the pool.
        pool: the books of its KV memory.
        scheduler: plans steps over the same pool.
        sampler: chooses tokens.
        tokenizer: for the text and stop strings; without one completions have no text.
        eos_token_ids: the model's end-of-sequence tokens.
        max_model_len: the longest sequence, prompt and output together.
        vocab_size: token ids of prompts must be below it; None not to check.
        grammars: compiles the forms of structured outputs; None if there is no real tokenizer.

    Raises:
        UnsupportedError: the pool needs something that the executor cannot do.
    """

    def __init__(
        self,
        executor: StepExecutor,
        pool: KVPool,
        scheduler: Scheduler,
        sampler: Sampler,
        tokenizer: StreamingTokenizer | None,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        vocab_size: int | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        can = executor.capabilities
        if (pool.shares and not can.shares) or (pool.page_size < max_model_len and not can.pages):
            raise UnsupportedError(
                "the executor",
                expected="shared pages, for a paged KV pool",
                found=str(can),
                remedy="Use a SlotPool (kv_cache='static'), or a backend with paged attention.",
            )
        self.executor, self.pool, self.scheduler, self.sampler = executor, pool, scheduler, sampler
        self.max_model_len, self.vocab_size, self.grammars = max_model_len, vocab_size, grammars
        self.clock = scheduler.clock  # for the times of requests and steps
        self.counters = Counters(prefix=pool.prefix_counters, padding=executor.padding)
        self.observers: list[Observer] = []
        self._guests: list[Guest] = []
        self.lock = RLock()  # the books, the KV memory and the executor belong to who holds it
        self._flight: InFlight | None = None  # holds sequences' next tokens, if there is one
        self._launcher: Launcher | None = None
        if can.samples:
            self._launcher = Launcher(cast(SamplingExecutor, executor), scheduler, pool, self.clock)
        self._eos = frozenset(eos_token_ids)
        self._decoder: Callable[[], StreamDecoder] | None = (
            None if tokenizer is None else tokenizer.stream
        )
        executor.allocate(pool.num_pages, pool.page_size, pool.host_pages)

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_step: Callable[[Counters], None] | None = None,
    ) -> list[list[Completion]]:
        """Completes every prompt.

        Args:
            prompts: token ids of each prompt.
            params: for all prompts or one for each; None for the defaults.
            on_step: called after each step, for a progress bar.

        Returns:
            for each prompt its `params.n` completions, in order.

        Raises:
            UsageError: a prompt or params that cannot be taken; nothing has run.
            CapacityError: a prompt too long for the KV pool; nothing has run.
            VerificationError: a prompt's logits are not finite, and the others have ended.
        """
        each = params_for(prompts, SamplingParams() if params is None else params)
        requests = [self._request(p, one) for p, one in zip(prompts, each, strict=True)]
        for index, request in enumerate(requests):
            request.name = f"prompt {index} of {len(prompts)}"
        try:
            with self.lock:
                for request in requests:
                    self._add(request)
            while not all(request.finished for request in requests):
                self.step()
                if on_step is not None:
                    on_step(self.counters)
        finally:
            self._release(requests)
        return [request.completions() for request in requests]

    def stream(self, prompt: list[int], params: SamplingParams | None = None) -> Iterator[Delta]:
        """Completes one prompt, and yields what each step adds. Closing the iterator ends it.

        Raises:
            UsageError, CapacityError: as `generate`, and at once, not at the first delta.
        """
        one = params_for([prompt], SamplingParams() if params is None else params)[0]
        check_streamed(one)
        return self._deltas(self._request(prompt, one, streams=True))

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams | None = None,
        *,
        submitted: float | None = None,
    ) -> Request:
        """Queues one prompt and returns: calls of `step` compute it, until it is `finished`.

        Args:
            prompt: token ids.
            params: None for the defaults.
            submitted: when it arrived, if that was earlier, in seconds of the clock.

        Returns:
            what `cancel` takes; once it is finished, it has the completions.

        Raises:
            UsageError, CapacityError: as `generate`.
        """
        request = self.prepare(prompt, params, submitted=submitted)
        self.add(request)
        return request

    def prepare(
        self,
        prompt: list[int],
        params: SamplingParams | None = None,
        *,
        streams: bool = False,
        submitted: float | None = None,
    ) -> Request:
        """What `submit` does before it queues the prompt: it is checked, and its form compiled, and
        no step waits for that.

        Args:
            prompt: token ids.
            params: None for the defaults.
            streams: whether `Request.take_deltas` is to give its tokens as they come.
            submitted: when it arrived, if that was earlier, in seconds of the clock.

        Raises:
            UsageError, CapacityError: as `generate`.
        """
        one = params_for([prompt], SamplingParams() if params is None else params)[0]
        if streams:
            check_streamed(one)
        return self._request(prompt, one, streams=streams, submitted=submitted)

    def add(self, request: Request) -> None:
        """Queues a request that is prepared."""
        with self.lock:
            self._add(request)

    def cancel(self, request: Request) -> None:
        """Gives up a request that was submitted, and frees its memory; one that has ended stays."""
        self._release([request])

    def step(self) -> None:
        """Computes one step of whatever is waiting or running; nothing if there is nothing. A
        request whose logits are not finite ends with an error of its own (`completions`).
        """
        with self.lock:
            started = self.clock()
            try:
                self._step(started)
            except BaseException:
                self._recover()
                raise
            if self._guests:
                for guest in [*self._guests]:
                    guest.advance()

    def invite(self, guest: Guest) -> None:
        """From now on each step is followed by one of a guest, until `dismiss`."""
        with self.lock:
            self._guests.append(guest)
            self.scheduler.num_guests += 1

    def dismiss(self, guest: Guest) -> None:
        """To be called by who holds the lock."""
        self._guests.remove(guest)
        self.scheduler.num_guests -= 1

    def settle(self) -> None:
        """Queues the sampling of what is in flight: to be called by who holds the lock before
        other work takes the place of its logits.
        """
        flight = self._flight
        if flight is not None and flight.launched.open and self._launcher is not None:
            self._launcher.choose(flight)

    def make_room(self, pages: int) -> None:
        """Preempts the youngest sequences while fewer pages are available, for work beside the
        scheduler's by who holds the lock.
        """
        while pages > self.pool.num_available and self.scheduler.running:
            self.scheduler.preempt(self.scheduler.running[-1])
        if self._launcher is not None:
            self._launcher.forget()

    def _step(self, started: float) -> None:
        flight = self._flight
        if flight is None:
            plan = self.scheduler.schedule()
            if not plan.beside:
                return
            _begin(plan, started)
            self._copy(plan.copies)
            if self._launcher is None or not self._launcher.takes(plan):
                sampled = self._accept(plan, self.executor.run(build_step(plan, self.pool)))
                self._count(Done(plan, (), plan.beside, sampled), started)
                return
            flight = self._launcher.launch(plan, None)
        assert self._launcher is not None
        if flight.launched.open and not self._launcher.choose(flight):
            self.counters.step((), 0, 0.0, flight.num_tokens)
            self._recover()
            return
        self._flight = self._ahead(self._launcher, flight)
        done = self._launcher.commit(flight)
        self._count(done, started)
        self._drop_void()

    def _count(self, done: Done, started: float) -> None:
        ended = self.clock()
        seconds, discarded = ended - started, done.num_discarded
        self.counters.step(done.beside, done.num_sampled, seconds, discarded, done.num_decoded)
        for observer in self.observers:
            observer.stepped(done, started, ended)

    def _ahead(self, launcher: Launcher, flight: InFlight) -> InFlight | None:
        """Launches the step behind the one in flight, if that can be planned yet."""
        plan = launcher.plan_ahead(flight)
        if plan is None:
            return None
        if plan.beside:
            _begin(plan, self.clock())
        self._copy(plan.copies)
        return launcher.launch(plan, flight)

    def _drop_void(self) -> None:
        """Forgets the step in flight if nobody waits for its tokens."""
        if self._flight is not None and self._flight.is_void:
            self.counters.step((), 0, 0.0, self._flight.num_tokens)
            self._flight = None

    def forget_copies(self) -> None:
        """After an exception: the prefix cache may count on copies from or to the host that have
        not been made.
        """
        if self.pool.host_pages:
            self.pool.clear_cache()

    def _recover(self) -> None:
        """After an exception. The pool may be ahead of what was computed and committed: what is in
        flight is discarded, and all sequences start anew from their tokens. Nothing of them goes
        to the prefix cache.
        """
        self._flight = None
        self.forget_copies()
        for seq in list(self.scheduler.running):
            seq.tell_late()
            if seq.finish_reason is None:
                self.scheduler.preempt(seq, keep=False)
            else:
                self.scheduler.drop(seq, keep=False)

    def _request(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        streams: bool = False,
        submitted: float | None = None,
    ) -> Request:
        arrived = self.clock() if submitted is None else submitted
        capacity = self.pool.max_tokens
        ids = check_prompt(
            prompt,
            max_model_len=self.max_model_len,
            max_tokens=capacity,
            vocab_size=self.vocab_size,
        )
        check_stop_strings(params, has_tokenizer=self._decoder is not None)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self._eos
        check_tokens(params, vocab_size=self.vocab_size, stop_ids=stop_ids)
        longest = min(self.max_model_len, capacity + 1)  # the last token needs no K and V
        max_tokens = min(params.max_new_tokens, longest - len(prompt))
        decoder = self._decoder
        return Request(
            prompt,
            params,
            stop_ids,
            max_tokens,
            decoder,
            streams=streams,
            prompt_ids=ids,
            submitted=arrived,
            matcher=self._matcher(params),
            # An executor that does not mix computes a prompt whole, or one token of a sequence.
            jumps=self.executor.capabilities.mixes,
        )

    def _matcher(self, params: SamplingParams) -> Callable[[], Matcher] | None:
        form = params.structured_outputs
        if form is None:
            return None
        make = check_structured(self.grammars).matcher
        return partial(make, form, ignore_eos=params.ignore_eos)

    def _add(self, request: Request) -> None:
        self.scheduler.add(request)
        for observer in self.observers:
            observer.added(request)

    def _deltas(self, request: Request) -> Iterator[Delta]:
        try:
            with self.lock:
                self._add(request)
            while True:
                # Other calls may have run steps while this one was waiting to go on.
                while deltas := self._take(request):
                    yield from deltas
                if request.finished:
                    return
                self.step()
        finally:
            self._release([request])

    def _accept(self, plan: Plan, logits: Tensor) -> int:
        """Samples the next token of each sequence whose logits there are; returns how many."""
        rows: list[int] = []
        targets: list[RunningSequence] = []
        to_fork: list[Request] = []
        scored: list[tuple[Request, range, int]] = []
        row = 0
        for chunk in plan.beside:
            seq = chunk.seq
            if seq.request.prompt_logprobs is not None and (places := chunk.scored):
                scored.append((seq.request, places, row))
                row += len(places)
            seq.num_computed = chunk.start + len(chunk.slots)
            if seq.remaining:
                continue
            if seq.request.forked:
                rows.append(row)
                targets.append(seq)
            else:  # all siblings draw their first token from the same row
                rows += [row] * len(seq.request.sequences)
                targets += seq.request.sequences
                to_fork.append(seq.request)
            row += 1
        self.sampler.prepare([seq.sampling for seq in targets])  # before anything waits for logits
        for request, places, start in scored:
            try:
                _score(request, places, logits[start : start + len(places)])
            except VerificationError as error:
                end_request(self.scheduler, request, error)
        if not targets:
            return 0
        if to_fork or scored:
            logits = logits[torch.tensor(rows, device=logits.device)]
        self._commit(targets, logits)
        for chunk in plan.beside:
            computed = chunk.start < len(chunk.seq.request.prompt) <= chunk.seq.num_computed
            if computed and chunk.seq.finish_reason != "error":
                self.scheduler.share(chunk.seq)  # its logits were numbers, so its K and V are
        for request in to_fork:
            self._copy(self.scheduler.fork(request))
        for seq in targets:
            if seq.finish_reason is not None:
                self.scheduler.drop(seq)
        return len(targets)

    def _commit(self, targets: list[RunningSequence], logits: Tensor) -> None:
        sampled = self.sampler.sample(logits, [seq.sampling for seq in targets])
        now = self.clock()
        broken = any(one.token_id == BROKEN for one in sampled)
        given_up = self.executor.recover() if broken else None
        for seq, one in zip(targets, sampled, strict=True):
            if one.token_id == BROKEN:
                error = given_up or broken_logits(seq.request)
                end_request(self.scheduler, seq.request, error)
            if seq.finish_reason is None:  # its prompt's logits, or a sibling's, may have ended it
                seq.accept(one, now)

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            sources, destinations = zip(*copies, strict=True)
            self.executor.copy_pages(sources, destinations)
            self.counters.copied_pages += len(copies)

    def _take(self, request: Request) -> list[Delta]:
        with self.lock:
            return request.take_deltas()

    def _release(self, requests: list[Request]) -> None:
        with self.lock:
            for request in requests:
                request.abandoned = not request.finished
                for seq in request.sequences:
                    self.scheduler.drop(seq)
            self._drop_void()


def _begin(plan: Plan, now: float) -> None:
    """Notes who starts with this step."""
    for chunk in plan.beside:
        if not chunk.seq.num_reached:
            chunk.seq.request.begin(now)


def _score(request: Request, places: range, logits: Tensor) -> None:
    """Notes the logprobs of the tokens behind these places of the prompt."""
    found, count = request.prompt_logprobs, request.params.prompt_logprobs
    assert found is not None and count is not None
    found += token_logprobs(logits, request.prompt[places.start + 1 : places.stop + 1], count)

"""What the loop knows of a request and of each of its sequences."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import TilewrightError
from .grammar import Matcher
from .output import Completion, Delta, FinishReason, Timings, TokenLogprobs, Usage
from .params import SamplingParams
from .sampling import Sampled, SamplingState
from .stopping import StopChecker, StreamDecoder

if TYPE_CHECKING:
    from .lag import Lag

_ids = itertools.count()


class Sequence:
    """One completion in the making. `id` is its name in the pool.

    What each token of it changes may lag behind, while many go on together: whoever asks for
    `tokens`, `timings`, `num_computed` or `in_flight` brings all of it up to date (`lag.py`).

    Attributes:
        rank: whose turn it is, smaller first: by priority, then deadline, then age.
        tokens: the prompt's and the generated token ids.
        limit: how many of these there may be.
        num_computed: how many of them have K and V in the pool, or will when the steps in flight
            are done; one of these may be of a token that is not known yet.
        in_flight: how many next tokens are being sampled in steps in flight; each counts as one
            token behind `tokens`.
        num_reached: the most that num_computed has been, before any preemption.
        sampling: how its tokens are chosen, and the output so far.
        timings: when its tokens came.
        num_cached: prompt tokens whose K and V came from another sequence: from the prefix cache,
            or from the one that this one was forked from.
        looked_up: whether it has looked for its prompt in the prefix cache.
        quiet: whether a token that does not end it changes nothing but its tokens and times: it has
            no form and no logprobs, and nobody waits for its text (`note_each`).
        finish_reason: None while it runs.
        error: why its completion is none; set together with finish_reason.
        lag: what has been noted of it and others together; None if nothing may have been.
    """

    __slots__ = (
        "_in_flight",
        "_num_computed",
        "_stops",
        "_text",
        "_timings",
        "_tokens",
        "deltas",
        "error",
        "finish_reason",
        "id",
        "index",
        "lag",
        "limit",
        "logprobs",
        "looked_up",
        "num_cached",
        "num_reached",
        "quiet",
        "rank",
        "request",
        "sampling",
    )

    def __init__(self, request: Request, index: int, stops: StopChecker) -> None:
        self.id, self.request, self.index = next(_ids), request, index
        self.rank = (request.params.priority, request.deadline, self.id)
        self.lag: Lag | None = None
        self._tokens = list(request.prompt)
        self.limit = len(request.prompt) + request.max_tokens
        self._num_computed = self.num_reached = self.num_cached = self._in_flight = 0
        self.looked_up = False
        matcher = request.matcher and request.matcher()
        self.sampling = SamplingState(
            request.params, request.prompt, request.stop_ids, index, matcher
        )
        self.finish_reason: FinishReason | None = None
        self.error: TilewrightError | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.deltas: list[Delta] = []
        self._timings = Timings(request.submitted)
        self._stops = stops
        self._text: list[str] = []
        self.quiet = matcher is None and not request.streams and not stops.watches_text
        self.quiet &= request.params.logprobs is None and not request.params.adjusts

    @property
    def tokens(self) -> list[int]:
        """The prompt's and the generated token ids."""
        if (lag := self.lag) is not None:
            lag.settle()
        return self._tokens

    @property
    def timings(self) -> Timings:
        """When its tokens came."""
        if (lag := self.lag) is not None:
            lag.settle()
        return self._timings

    @property
    def num_computed(self) -> int:
        """How many tokens have K and V, as the class has it."""
        if (lag := self.lag) is not None:
            lag.settle()
        return self._num_computed

    @num_computed.setter
    def num_computed(self, count: int) -> None:
        if (lag := self.lag) is not None:
            lag.end()
        self._num_computed = count

    @property
    def in_flight(self) -> int:
        """How many next tokens are being sampled."""
        if (lag := self.lag) is not None:
            lag.settle()
        return self._in_flight

    @in_flight.setter
    def in_flight(self, count: int) -> None:
        if (lag := self.lag) is not None:
            lag.end()
        self._in_flight = count

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        if (lag := self.lag) is not None:
            lag.settle()
        return len(self._tokens) + self._in_flight - self._num_computed

    @property
    def num_tokens(self) -> int:
        """How many tokens there are, those in flight among them."""
        if (lag := self.lag) is not None:
            lag.settle()
        return len(self._tokens) + self._in_flight

    def start_at(self, cached: int) -> None:
        """It starts, or starts anew, with `cached` tokens that need not be computed."""
        self.num_computed = cached
        # When it starts anew, what it finds beyond what it had at first is its own work.
        before = self.num_cached if self.num_reached else len(self.request.prompt)
        self.num_cached = min(cached, before)

    def accept(self, sampled: Sampled, now: float) -> None:
        """Takes the next token, sampled at `now` (`time.perf_counter()`), and those that its form
        forces then, which need no sampling: they are computed together, as a chunk. Their logprobs
        would be known one step later, so where they are asked for each is sampled by itself; and
        so is the first of them where it is on its way already.
        """
        matcher = self.sampling.matcher
        if matcher is None:
            self.take(sampled.token_id, now, sampled.logprobs)
            return
        jumps = self.request.jumps and not self.in_flight and self.request.params.logprobs is None
        self._follow(sampled.token_id, matcher, now, sampled.logprobs)
        while jumps and self.finish_reason is None and matcher.forced is not None:
            self._follow(matcher.forced, matcher, now)

    def take(self, token: int, now: float, logprobs: TokenLogprobs | None = None) -> None:
        """`accept`, of a sequence that has no form."""
        if (lag := self.lag) is not None:
            lag.end()
        self._tokens.append(token)
        self.sampling.commit(token)
        self._timings.token(now)
        self.tell(logprobs)

    def tell(self, logprobs: TokenLogprobs | None = None) -> None:
        """What the last of `tokens` adds to the text, and whether it ends the sequence, which has
        no form: to be called once for each that was noted; of those that are `quiet` for some.
        """
        if (lag := self.lag) is not None:
            lag.settle()
        tokens, known = self._tokens, len(self.request.prompt) + self._stops.num_tokens
        if known + 1 < len(tokens):
            self._stops.skip(tokens[known:-1])
        token = tokens[-1]
        text, self.finish_reason = self._stops.push(token)
        self._say(text, token, logprobs)

    def tell_late(self) -> None:
        """`tell`, if an exception has come between that and `note_each`."""
        known = len(self.request.prompt) + self._stops.num_tokens
        if (
            self.sampling.matcher is None
            and self.finish_reason is None
            and known < len(self.tokens)
        ):
            self.tell()

    def _follow(
        self, token: int, matcher: Matcher, now: float, logprobs: TokenLogprobs | None = None
    ) -> None:
        self.tokens.append(token)
        self.sampling.commit(token)
        self.timings.token(now)
        text, self.finish_reason = self._stops.push(token)
        if matcher.stopped:
            self.error = matcher.error()
            if self.finish_reason is None:
                text += self._stops.finish()
            self.finish_reason = "stop"
        self._say(text, token, logprobs)

    def _say(self, text: str, token: int, logprobs: TokenLogprobs | None) -> None:
        if text:
            self._text.append(text)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self.request.streams and self.error is None:
            each = [logprobs] if logprobs is not None else None
            self.deltas.append(Delta(self.index, text, [token], self.finish_reason, each))

    def catch_up(self, start: int, tokens: list[int], gaps: list[float], now: float) -> None:
        """Takes tokens that were noted, as `note_each` does for one; what an earlier call that was
        interrupted has taken is not taken twice.

        Args:
            start: of how many tokens there were before these.
            gaps: seconds from each one's token before to it.
            now: when the last one came.
        """
        known, output, itl = self._tokens, self.sampling.output, self._timings.itl
        known += tokens[len(known) - start :]
        output += known[len(self.request.prompt) + len(output) :]
        itl += gaps[len(gaps) - (len(output) - 1 - len(itl)) :]
        self._timings.last = now
        self.num_reached = len(known) - 1

    def counts(self, num_computed: int, in_flight: int) -> None:
        """Takes over how far it is."""
        self._num_computed, self._in_flight = num_computed, in_flight

    def expire(self) -> None:
        """Ends it as it is, because its time is over."""
        self._stops.skip(self.tokens[len(self.request.prompt) + self._stops.num_tokens :])
        text, self.finish_reason = self._stops.finish(), "deadline"
        self._text.append(text)
        if self.request.streams:
            self.deltas.append(Delta(self.index, text, [], self.finish_reason))

    def fail(self, error: TilewrightError) -> None:
        """Ends it without a completion."""
        self.error, self.finish_reason = error, "error"

    def completion(self) -> Completion:
        """The finished completion; raises its error, if it has one."""
        assert self.finish_reason is not None
        if self.error is not None:
            raise self.error
        num_prompt = len(self.request.prompt)
        output = self.tokens[num_prompt:]
        return Completion(
            token_ids=output,
            text="".join(self._text),
            finish_reason=self.finish_reason,
            logprobs=self.logprobs if self.request.params.logprobs is not None else None,
            usage=Usage(num_prompt, len(output), self.num_cached),
            timings=self.timings,
            prompt_logprobs=self.request.prompt_logprobs,
        )


def launch_each(seqs: list[Sequence]) -> None:
    """Notes that a step is on its way that computes a token of each, and samples the next."""
    for seq in seqs:
        if seq.lag is not None:
            seq.lag.end()
        seq._num_computed += 1
        seq._in_flight += 1


def note_each(seqs: list[Sequence], tokens: list[int], now: float) -> None:
    """What `Sequence.take` does before it tells, for many that decode and have no form: each gets a
    token that was in flight. Those that are not `quiet`, and those that it may end, are told of it
    next (`Sequence.tell`); others with some later token.
    """
    for seq, token in zip(seqs, tokens, strict=True):
        if seq.lag is not None:
            seq.lag.end()
        known = seq._tokens
        seq._in_flight -= 1
        seq.num_reached = len(known)
        known.append(token)
        seq.sampling.output.append(token)
        seq._timings.token(now)


class Request:
    """One prompt and the `params.n` sequences that continue it.

    The first sequence computes the prompt; the others are forked from it when that is done.

    Args:
        prompt: token ids, at least one.
        params: how to sample and when to stop.
        stop_ids: the tokens that end a sequence.
        max_tokens: the most tokens a sequence may generate.
        decoder: makes a new decoder of text, or None for no text.
        streams: whether to keep a Delta for each token.
        prompt_ids: the prompt as i64[P]; made of it if it is not given.
        submitted: when it arrived (`time.perf_counter()`); now, if it is not given.
        matcher: makes what holds a sequence to its form; None for any.
        jumps: whether tokens that the form forces are computed together.

    Attributes:
        namespace: sequences share cached prefixes only if theirs are equal.
        deadline: when it ends whatever there is (`time.perf_counter()`), infinity for never.
        name: of the request, for messages.
        abandoned: whether it was given up before it had ended.
        prompt_logprobs: of the prompt's first tokens, as far as they are computed, None for the
            first of them and for those before `prompt_logprobs_start`; None if they were not asked
            for.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        stop_ids: frozenset[int],
        max_tokens: int,
        decoder: Callable[[], StreamDecoder] | None,
        *,
        streams: bool = False,
        prompt_ids: NDArray[np.int64] | None = None,
        submitted: float | None = None,
        matcher: Callable[[], Matcher] | None = None,
        jumps: bool = False,
    ) -> None:
        self.prompt, self.params, self.stop_ids, self.streams = prompt, params, stop_ids, streams
        self.prompt_ids = np.array(prompt, dtype=np.int64) if prompt_ids is None else prompt_ids
        self.matcher, self.jumps = matcher, jumps
        self.submitted = time.perf_counter() if submitted is None else submitted
        self.max_tokens, self.name = max_tokens, "the request"
        self.namespace: Hashable = params.cache_namespace
        self.deadline = math.inf if params.deadline is None else self.submitted + params.deadline
        self.forked, self.abandoned = params.n == 1, False
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            start = min(params.prompt_logprobs_start, len(prompt))
            self.prompt_logprobs = [None] * max(1, start)
        self.sequences = [
            Sequence(self, index, StopChecker(params, stop_ids, max_tokens, decoder and decoder()))
            for index in range(params.n)
        ]

    @property
    def scoring(self) -> bool:
        """Whether logprobs of the prompt are wanted that are not computed yet."""
        found = self.prompt_logprobs
        return found is not None and len(found) < len(self.prompt)

    @property
    def finished(self) -> bool:
        """Whether all sequences have ended."""
        return all(seq.finish_reason is not None for seq in self.sequences)

    def completions(self) -> list[Completion]:
        """The `n` completions of a finished request, in order."""
        return [seq.completion() for seq in self.sequences]

    def begin(self, now: float) -> None:
        """Notes that the first step with tokens of it is planned; later calls change nothing."""
        for seq in self.sequences:
            if seq.timings.scheduled is None:
                seq.timings.scheduled = now

    def take_deltas(self) -> list[Delta]:
        """The deltas since the last call, in the order of their sequences; raises the error of one
        that has none to come.
        """
        deltas = [delta for seq in self.sequences for delta in seq.deltas]
        if not deltas:
            for seq in self.sequences:
                if seq.error is not None:
                    raise seq.error
        for seq in self.sequences:
            seq.deltas.clear()
        return deltas

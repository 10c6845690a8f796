"""What a loop does and how long its requests take, under the names that vLLM gives such figures.

A step costs an append here. All else is read from the requests when somebody asks: a request's
times are kept in it anyway, and of one that still runs what came since the last time is added.
Asking needs no lock of the loop's, so that nobody waits for a step: lists only grow, and a request
that ends in between is complete the next time.

Model FLOPs and bandwidth utilisation are not among them: what a step must compute and read is in
the graph, which `tilewright bench` looks into. Tokens and seconds of both phases are here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .plan import Chunk
from .request import Request
from .request import Sequence as RunningSequence

if TYPE_CHECKING:
    from .loop import GenerationLoop

Item = TypeVar("Item")

# vLLM's bounds, and finer ones below them, where its first bucket would hold everything.
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
LATENCY = (0.001, 0.003, 0.01, 0.03, 0.1, *_LATENCY, 7680)
_TTFT = (0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TTFT = (0.001, 0.0025, 0.005, 0.01, *_TTFT, 640, 2560)
_ITL = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
ITL = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, *_ITL)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REASONS = ("stop", "length", "abort")  # that are shown before there is one

HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {  # without bounds: up to the context
    "time_to_first_token_seconds": ("From arrival to the first token.", TTFT),
    "inter_token_latency_seconds": ("Between one token of a request and the next.", ITL),
    "request_time_per_output_token_seconds": ("Mean time between tokens of a request.", ITL),
    "e2e_request_latency_seconds": ("From arrival to the last token.", LATENCY),
    "request_queue_time_seconds": ("From arrival to the request's first step.", LATENCY),
    "request_inference_time_seconds": ("From its first step to its last token.", LATENCY),
    "request_prefill_time_seconds": ("From its first step to its first token.", LATENCY),
    "request_decode_time_seconds": ("From its first token to its last.", LATENCY),
    "request_prompt_tokens": ("Tokens of the prompt.", ()),
    "request_prefill_kv_computed_tokens": ("Tokens of the prompt that were not cached.", ()),
    "request_generation_tokens": ("Tokens generated.", ()),
    "request_params_max_tokens": ("The most tokens that a request may generate.", ()),
    "request_params_n": ("Completions that a request asks for.", (1, 2, 5, 10, 20)),
    "iteration_tokens_total": ("Tokens that one step computes.", STEP_TOKENS),
}
_FOLD_AFTER = 256  # steps that nobody has asked after


class Histogram:
    """Counts of values by buckets, each of which ends at its bound, as Prometheus has them.

    Attributes:
        bounds: f64[N], rising.
        counts: i64[N + 1], of each bucket alone; the last one is of what is over all bounds.
        sum: of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds: NDArray[np.float64] = np.array(bounds, dtype=np.float64)
        self.counts: NDArray[np.int64] = np.zeros(len(bounds) + 1, dtype=np.int64)
        self.sum = 0.0

    def add(self, values: Sequence[float]) -> None:
        """Counts some values."""
        if values:
            found = np.array(values, dtype=np.float64)
            places = self.bounds.searchsorted(found)
            self.counts += np.bincount(places, minlength=len(self.counts))
            self.sum += float(found.sum())


@dataclass(frozen=True, slots=True)
class Reading:
    """One metric at one moment.

    Attributes:
        name: without prefix; those of vLLM are named as there.
        kind: as Prometheus has it.
        text: what it is.
        value: a number, one for each value of `label`, or a histogram.
        label: "" for none.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    text: str
    value: float | Mapping[str, float] | Histogram
    label: str = ""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What a loop holds at one moment.

    Attributes:
        running: sequences that hold pages.
        waiting: sequences that wait for a place.
        pages_used: of the KV memory, by sequences that run.
        pages: that could be.
    """

    running: int
    waiting: int
    pages_used: int
    pages: int


class _Watched:
    """A sequence that has not ended when it was looked at, and how many of its tokens count."""

    __slots__ = ("num_tokens", "seq")

    def __init__(self, seq: RunningSequence) -> None:
        self.seq, self.num_tokens = seq, 0


class Metrics:
    """Figures of one loop. Requests count from when this is made, counters from the loop's start.

    Args:
        loop: is watched from now on.
        model_name: to tell it from others.
    """

    def __init__(self, loop: GenerationLoop, model_name: str) -> None:
        self.loop, self.model_name = loop, model_name
        lengths = _one_two_five(loop.max_model_len)
        self.histograms = {
            name: Histogram(bounds or lengths) for name, (_, bounds) in HISTOGRAMS.items()
        }
        self.finished = dict.fromkeys(REASONS, 0)
        self.prompt_tokens = self.prompt_tokens_cached = 0
        self._new: deque[_Watched] = deque()  # appended to by steps, taken from by `refresh`
        self._steps: deque[int] = deque()
        self._watched: list[_Watched] = []
        self._tokens = loop.counters.tokens_computed
        self._lock = Lock()  # two may ask at once
        loop.observers.append(self)

    def added(self, request: Request) -> None:
        """A request was queued."""
        self._new.extend(map(_Watched, request.sequences))

    def stepped(self, chunks: Sequence[Chunk], started: float, ended: float) -> None:
        """A step was computed."""
        tokens = self.loop.counters.tokens_computed
        self._steps.append(tokens - self._tokens)
        self._tokens = tokens
        if len(self._steps) >= _FOLD_AFTER:  # ended requests are held until then
            self.refresh()

    def refresh(self) -> None:
        """Counts what has come since the last time."""
        with self._lock:
            self.histograms["iteration_tokens_total"].add([*map(float, _drain(self._steps))])
            self._watched += _drain(self._new)
            first: list[float] = []
            between: list[float] = []
            ended: list[RunningSequence] = []
            still: list[_Watched] = []
            for one in self._watched:
                seq = one.seq
                over = seq.finish_reason is not None or seq.request.abandoned
                self._look(one, first, between)  # after that, so that what is over is complete
                if over:
                    ended.append(seq)
                else:
                    still.append(one)
            self._watched = still
            self.histograms["time_to_first_token_seconds"].add(first)
            self.histograms["inter_token_latency_seconds"].add(between)
            self._end(ended)

    def _look(self, one: _Watched, first: list[float], between: list[float]) -> None:
        seq, timings = one.seq, one.seq.timings
        if timings.last is None:
            return
        if not one.num_tokens:
            one.num_tokens = 1
            first.append(timings.ttft)
            self.prompt_tokens += len(seq.request.prompt)
            self.prompt_tokens_cached += seq.num_cached
        new = timings.itl[one.num_tokens - 1 :]
        between += new
        one.num_tokens += len(new)

    def _end(self, seqs: Sequence[RunningSequence]) -> None:
        values: dict[str, list[float]] = {}
        for seq in seqs:
            reason = seq.finish_reason or "abort"
            self.finished[reason] = self.finished.get(reason, 0) + 1
            if reason not in ("abort", "error"):  # as in vLLM, these have no times
                for name, value in _values(seq).items():
                    values.setdefault(name, []).append(value)
        for name, each in values.items():
            self.histograms[name].add(each)

    def occupancy(self) -> Occupancy:
        """What the loop holds now; asking for it costs nothing."""
        scheduler, pool = self.loop.scheduler, self.loop.pool
        pages = pool.num_pages - pool.shares  # page 0 of a pool that shares is nobody's
        used = pages - pool.num_available
        return Occupancy(len(scheduler.running), len(scheduler.waiting), used, pages)

    def read(self) -> Iterator[Reading]:
        """All of them, up to date."""
        self.refresh()
        yield from self._gauges()
        yield from self._counters()
        for name, histogram in self.histograms.items():
            yield Reading(name, "histogram", HISTOGRAMS[name][0], histogram)

    def _gauges(self) -> Iterator[Reading]:
        now = self.occupancy()
        used = now.pages_used / now.pages
        yield Reading("num_requests_running", "gauge", "Sequences that hold pages.", now.running)
        yield Reading(
            "num_requests_waiting", "gauge", "Sequences that wait for a place.", now.waiting
        )
        yield Reading("kv_cache_usage_perc", "gauge", "Share of pages in use, 0 to 1.", used)

    def _counters(self) -> Iterator[Reading]:
        of, prefix = self.loop.counters, self.loop.counters.prefix
        preemptions = self.loop.scheduler.num_preemptions
        tokens = {"prefill": of.prefill_tokens, "decode": of.decode_tokens}
        seconds = {"prefill": of.prefill_seconds, "decode": of.decode_seconds}
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up.", prefix.lookup_tokens),
            ("prefix_cache_hits", "Prompt tokens that were found.", prefix.hit_tokens),
            ("prefix_cache_evicted_pages", "Cached pages given up.", prefix.evicted_pages),
            ("num_preemptions", "How often a sequence lost its pages.", preemptions),
            ("prompt_tokens", "Tokens of prompts, cached ones too.", self.prompt_tokens),
            ("prompt_tokens_cached", "Of these, cached ones.", self.prompt_tokens_cached),
            ("generation_tokens", "Tokens generated.", of.sampled_tokens),
            ("recomputed_tokens", "Tokens computed again.", of.recomputed_tokens),
            ("discarded_tokens", "Tokens computed for nobody.", of.discarded_tokens),
        ):
            yield Reading(name, "counter", text, value)
        yield Reading(
            "request_success", "counter", "Ended.", dict(self.finished), "finished_reason"
        )
        yield Reading("computed_tokens", "counter", "Tokens computed.", tokens, "phase")
        padding = {"prefill": of.padding.prefill, "decode": of.padding.decode}
        text = "Tokens computed to fill batches; not among computed_tokens."
        yield Reading("padding_tokens", "counter", text, padding, "phase")
        text = "Time in steps; those with any prompt tokens are prefill."
        yield Reading("step_seconds", "counter", text, seconds, "phase")


def _values(seq: RunningSequence) -> dict[str, float]:
    """Of a sequence that has ended, by the histogram that they belong to."""
    times, params, prompt = seq.timings, seq.request.params, len(seq.request.prompt)
    return {
        "request_time_per_output_token_seconds": times.tpot,
        "e2e_request_latency_seconds": times.e2e,
        "request_queue_time_seconds": times.queue,
        "request_inference_time_seconds": times.prefill + times.decode,
        "request_prefill_time_seconds": times.prefill,
        "request_decode_time_seconds": times.decode,
        "request_prompt_tokens": prompt,
        "request_prefill_kv_computed_tokens": prompt - seq.num_cached,
        "request_generation_tokens": len(seq.tokens) - prompt,
        "request_params_max_tokens": params.max_new_tokens,
        "request_params_n": params.n,
    }


def _drain(items: deque[Item]) -> list[Item]:
    return [items.popleft() for _ in range(len(items))]


def _one_two_five(most: int) -> list[float]:
    """1, 2, 5, 10, 20, … up to `most`."""
    bounds = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return [float(bound) for bound in bounds if bound <= most]

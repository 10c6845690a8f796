"""``bench serve``: an engine under a load of requests, by the figures of `vllm bench serve`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...errors import UsageError
from ...runtime.engine import CausalLMEngine
from ...runtime.loop import GenerationLoop
from ...runtime.output import Completion
from .latency import Advance, bench_threads, engine_dtype
from .load import Load, LoadDriver
from .phases import Phase, PhaseMeter, rate_phases
from .workloads import Conversation, Shape, arrival_times, num_requests, random_conversations

OBJECTIVES = ("ttft", "tpot", "e2el")
WARMUP_SEED = 1_000_003  # no workload's


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of times in seconds; percentiles are interpolated between neighbours, as numpy's are."""

    mean: float = 0.0
    median: float = 0.0
    std: float = 0.0
    p90: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution:
        """Of these; all 0 of none."""
        if not values:
            return cls()
        array = np.array(values, dtype=np.float64)
        median, p90, p99 = map(float, np.percentile(array, (50, 90, 99)))
        return cls(float(array.mean()), median, float(array.std()), p90, p99)


@dataclass(frozen=True, slots=True)
class Served:
    """What a load came to. Rates are of `seconds`.

    Attributes:
        completed, failed: requests; those that failed could not be taken.
        seconds: from the start to the last token.
        input_tokens, output_tokens: of completed requests.
        good: of these, how many kept to all objectives; None without objectives.
        most_at_once: requests.
        ttft, tpot, itl, e2el, queue: by `Timings`; TPOT of requests of more than one token.
        prefix_queries, prefix_hits: tokens of prompts that were looked up, and found.
        preemptions: sequences that lost their pages.
        errors: why requests failed, each reason once.
        phases: "prefill" and "decode".
    """

    completed: int
    failed: int
    seconds: float
    input_tokens: int
    output_tokens: int
    good: int | None
    most_at_once: int
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution
    queue: Distribution
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    errors: tuple[str, ...] = ()
    phases: Mapping[str, Phase] = field(default_factory=dict)

    @property
    def request_throughput(self) -> float:
        """Completed requests a second."""
        return self._rate(self.completed)

    @property
    def goodput(self) -> float | None:
        """Requests a second that kept to all objectives."""
        return None if self.good is None else self._rate(self.good)

    @property
    def output_throughput(self) -> float:
        """Generated tokens a second."""
        return self._rate(self.output_tokens)

    @property
    def total_throughput(self) -> float:
        """Tokens of prompts and generated ones a second."""
        return self._rate(self.input_tokens + self.output_tokens)

    @property
    def prefix_hit_rate(self) -> float | None:
        """Share of the tokens looked up that were found; None where nothing was looked up."""
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else None

    def _rate(self, count: int) -> float:
        return count / self.seconds if self.seconds else 0.0


def parse_objectives(texts: Sequence[str]) -> dict[str, float]:
    """Service level objectives from "ttft:200 tpot:30", milliseconds to seconds.

    Raises:
        UsageError: another name, or no number above 0.
    """
    found = {}
    for part in " ".join(texts).replace(",", " ").split():
        name, _, value = part.partition(":")
        try:
            seconds = float(value) / 1e3
        except ValueError:
            seconds = math.nan
        if name not in OBJECTIVES or not 0 < seconds < math.inf:
            raise UsageError(
                "option --goodput",
                expected=f"NAME:MILLISECONDS, with a name of {', '.join(OBJECTIVES)}",
                found=repr(part),
                remedy="Write for example --goodput 'ttft:200 tpot:30'.",
            )
        found[name] = seconds
    return found


def run_load(
    loop: GenerationLoop,
    conversations: Sequence[Conversation],
    arrivals: Sequence[float],
    objectives: Mapping[str, float] | None = None,
    *,
    concurrency: int | None = None,
    think: float = 0.0,
    wait: Callable[[float], None] | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Served:
    """Runs a load on a loop that has nothing else to do.

    Args:
        loop: whose clock times everything.
        conversations, arrivals: who says what, and when each begins, in seconds from now.
        objectives: seconds, by names of OBJECTIVES.
        concurrency, think, wait, advance: as `LoadDriver` has them.
    """
    prefix, preemptions = loop.counters.prefix, loop.scheduler.num_preemptions
    queries, hits = prefix.lookup_tokens, prefix.hit_tokens
    meter = PhaseMeter()
    driver = LoadDriver(loop, concurrency=concurrency, think=think, wait=wait, advance=advance)
    loop.observers.append(meter)
    try:
        load = driver.run(conversations, arrivals)
    finally:
        loop.observers.remove(meter)
    times = [one.timings for one in load.done]
    return Served(
        completed=len(load.done),
        failed=len(load.failed),
        seconds=load.seconds,
        input_tokens=sum(one.usage.prompt_tokens for one in load.done),
        output_tokens=sum(one.usage.completion_tokens for one in load.done),
        good=_count_good(load, objectives),
        most_at_once=load.most_at_once,
        ttft=Distribution.of([one.ttft for one in times]),
        tpot=Distribution.of([one.tpot for one in times if one.itl]),
        itl=Distribution.of([itl for one in times for itl in one.itl]),
        e2el=Distribution.of([one.e2e for one in times]),
        queue=Distribution.of([one.queue for one in times]),
        prefix_queries=prefix.lookup_tokens - queries,
        prefix_hits=prefix.hit_tokens - hits,
        preemptions=loop.scheduler.num_preemptions - preemptions,
        errors=tuple(dict.fromkeys(load.failed)),
        phases=meter.phases,
    )


def _count_good(load: Load, objectives: Mapping[str, float] | None) -> int | None:
    if not objectives:
        return None
    return sum(_is_good(one, objectives) for one in load.done)


def _is_good(one: Completion, objectives: Mapping[str, float]) -> bool:
    times = one.timings
    found = {"ttft": times.ttft, "tpot": times.tpot, "e2el": times.e2e}
    return all(found[name] <= most for name, most in objectives.items())


def measure_serving(
    engine: CausalLMEngine,
    conversations: Sequence[Conversation],
    *,
    rate: float = math.inf,
    fixed: bool = False,
    concurrency: int | None = None,
    think: float = 0.0,
    objectives: Mapping[str, float] | None = None,
    seed: int = 0,
    advance: Advance = lambda phase, share: None,
) -> Served:
    """Runs a load on an engine, on its own clock.

    Args:
        engine: with nothing else to do.
        conversations: what is said.
        rate: requests a second, infinity for all at once; conversations begin at the rate that
            gives this.
        fixed: whether they begin at even distances, else as a Poisson process.
        concurrency: the most requests at once, None for no limit.
        think: seconds between an answer and the next turn.
        objectives: seconds, by names of OBJECTIVES.
        seed: of the arrivals.
        advance: told what runs, and the share that is done.
    """
    total = num_requests(conversations)
    rng = np.random.default_rng((seed, 1))  # not the generator of the prompts
    starts = rate * len(conversations) / total
    arrivals = arrival_times(len(conversations), starts, rng, fixed=fixed)
    with bench_threads():
        found = run_load(
            engine.loop,
            conversations,
            arrivals,
            objectives,
            concurrency=concurrency,
            think=think,
            advance=lambda done: advance(f"{done} of {total} requests", done / total),
        )
    dtype = str(engine_dtype(engine)).removeprefix("torch.")
    rate_phases(engine, dict(found.phases), dtype)
    return found


def warm_up(engine: CausalLMEngine, conversations: Sequence[Conversation], count: int) -> None:
    """Runs so many requests at once, of the lengths of a load's first ones but of other tokens, so
    that what they need is compiled and captured. The prefix cache is empty afterwards.
    """
    rng = np.random.default_rng(WARMUP_SEED)
    turns = [turn for conversation in conversations for turn in conversation][:count]
    shapes = [Shape(len(turn.tokens), turn.output_tokens) for turn in turns]
    vocab = engine.config.vocab_size
    others = [one for shape in shapes for one in random_conversations(shape, 1, vocab, rng)]
    LoadDriver(engine.loop).run(others, [0.0] * len(others))
    with engine.loop.lock:
        engine.pool.clear_cache()

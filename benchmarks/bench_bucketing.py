"""Offline prompts of mixed lengths on a slot backend: one at a time, and batched in three ways.

    python benchmarks/bench_bucketing.py MODEL [--backend onnxruntime] [--prompts 24] [--slots 8]
        [--shortest 8] [--longest 160] [--new-tokens 16] [--rounds 3] [--json]

MODEL is a folder or file that ``tilewright compile`` takes, or an engine with a slot cache. All
ways compute the same prompts of random tokens, in turns, and their tokens are compared. "arrival"
pads whoever comes next to the longest of its batch, "continuous" computes each prompt alone, and
"bucketed" pads prompts of about one length; sequences decode together in all but "alone", where
each prompt is a call of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tilewright as tw
from tilewright.runtime.bucketing import LengthBuckets
from tilewright.runtime.engine import CausalLMEngine

WAYS = ("alone", "continuous", "arrival", "bucketed")


@dataclass(frozen=True, slots=True)
class Result:
    """One way.

    Attributes:
        seconds: of all prompts, median over the rounds.
        cpu_seconds: of all threads: what is left to look at on a machine that others use.
        prefill_seconds: of that, in steps with prompts.
        tokens_per_second: prompts and answers.
        steps: of the model.
        padding_tokens, padding_share: what filled the batches.
    """

    seconds: float
    cpu_seconds: float
    prefill_seconds: float
    tokens_per_second: float
    steps: int
    padding_tokens: int
    padding_share: float


@dataclass(frozen=True, slots=True)
class _Run:
    seconds: float
    cpu: float
    prefill: float
    steps: int
    computed: int
    padding: int
    tokens: list[list[int]]


def main() -> None:
    """Measures and prints."""
    options = _options()
    engine = _opened(options)
    assert isinstance(engine, CausalLMEngine)
    draw = random.Random(0)
    prompts = [
        [draw.randrange(engine.config.vocab_size) for _ in range(length)]
        for length in _lengths(draw, options.prompts, options.shortest, options.longest)
    ]
    runs: dict[str, list[_Run]] = {way: [] for way in WAYS}
    for _ in range(options.rounds + 1):
        for way in WAYS:
            runs[way].append(_run(engine, way, prompts, options.new_tokens))
    found = {way: _result(each[1:], prompts, options.new_tokens) for way, each in runs.items()}
    same = {way: _agreeing(each[0], runs["alone"][0]) for way, each in runs.items()}
    if options.json:
        data = {way: {**asdict(one), "same_tokens": same[way]} for way, one in found.items()}
        print(json.dumps({"lengths": [*map(len, prompts)], "ways": data}, indent=2))
        return
    for way, one in found.items():
        print(
            f"{way:>10}  {one.seconds:6.2f} s, CPU {one.cpu_seconds:6.2f}  "
            f"(prefill {one.prefill_seconds:5.2f})  "
            f"{one.tokens_per_second:7.1f} tok/s  {one.steps:4} steps  "
            f"padding {one.padding_tokens:5} = {one.padding_share:.1%}  "
            f"{same[way]} of {len(prompts)} answers as alone"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--backend", default="onnxruntime")
    for name, default in (
        ("prompts", 24),
        ("slots", 8),
        ("shortest", 8),
        ("longest", 160),
        ("new-tokens", 16),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _opened(options: argparse.Namespace) -> tw.Engine:
    if (Path(options.model) / "manifest.json").exists():
        return tw.load(options.model)
    return tw.compile(
        options.model,
        backend=options.backend,
        kv_cache="static",
        max_batch_size=options.slots,
        max_model_len=options.longest + options.new_tokens,
        verify="off",
    )


def _lengths(draw: random.Random, count: int, shortest: int, longest: int) -> list[int]:
    """Each octave of lengths as often as the next, in random order."""
    ratio = longest / shortest
    return [round(shortest * ratio ** draw.random()) for _ in range(count)]


def _run(engine: CausalLMEngine, way: str, prompts: list[list[int]], new_tokens: int) -> _Run:
    scheduler, counters = engine.loop.scheduler, engine.counters
    longest = engine.config.max_model_len
    scheduler.buckets = {
        "arrival": LengthBuckets((longest,)),
        "bucketed": LengthBuckets.up_to(longest),
    }.get(way)
    before = (counters.steps, counters.tokens_computed, counters.padding_tokens)
    prefill = counters.prefill_seconds
    params = tw.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    started, worked = time.perf_counter(), time.process_time()
    calls = [[prompt] for prompt in prompts] if way == "alone" else [prompts]
    done = [one for call in calls for one in engine.generate(call, params)]
    seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    after = (counters.steps, counters.tokens_computed, counters.padding_tokens)
    steps, computed, padding = (b - a for a, b in zip(before, after, strict=True))
    tokens = [one.token_ids for one in done]
    prefill = counters.prefill_seconds - prefill
    return _Run(seconds, cpu, prefill, steps, computed, padding, tokens)


def _agreeing(run: _Run, other: _Run) -> int:
    return sum(a == b for a, b in zip(run.tokens, other.tokens, strict=True))


def _result(runs: list[_Run], prompts: list[list[int]], new_tokens: int) -> Result:
    tokens = sum(map(len, prompts)) + len(prompts) * new_tokens
    seconds = statistics.median(run.seconds for run in runs)
    last = runs[-1]
    return Result(
        seconds,
        statistics.median(run.cpu for run in runs),
        statistics.median(run.prefill for run in runs),
        tokens / seconds,
        last.steps,
        last.padding,
        last.padding / (last.padding + last.computed),
    )


if __name__ == "__main__":
    main()

"""What the runtime of many requests gives on a GPU: loads, chunked prefill, forms, host time.

    python benchmarks/bench_serving.py CONFIG --out FILE [--rates 8,14] [--parts loads,chunks]

Parts, each of one engine with random weights:

loads: serving_loads.py's, which benchmarks/gpu/vllm_serving.py gives to vLLM too; and what the host
    spends on a decode step of 128 sequences beside waiting for the device.
cold: Poisson loads alone, of which the first finds an engine that has only warmed up.
host: where that time goes.
chunks: 16 sequences decode while a prompt of 32k tokens arrives, with and without chunks.
forms: 32 sequences decode freely, and with a JSON schema (the folder needs a tokenizer).
prefix: 64 prompts of 1024 tokens, nine tenths of them shared, with and without the prefix cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from host_parts import DeviceTimes, Parts, queue_calls
from serving_loads import chosen, line, summary
from step_times import StepTimes, table

import tilewright as tw
from tilewright.compiler.bench.load import LoadDriver
from tilewright.runtime import batch, in_flight
from tilewright.runtime.collector import freeze
from tilewright.runtime.decode_buffer import Launched
from tilewright.runtime.engine import CausalLMEngine
from tilewright.runtime.lag import Lag

_MADE: dict[tuple[int, int], CausalLMEngine] = {}
LONG_PROMPT, DECODING, TURNS = 32_768, 16, 9
SCHEMA = {
    "type": "object",
    "properties": {"notes": {"type": "array", "items": {"type": "string"}, "minItems": 9}},
    "required": ["notes"],
    "additionalProperties": False,
}


def main() -> None:
    """Compiles, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rates", default="")
    parser.add_argument("--parts", default="loads,chunks")
    parser.add_argument("--quantize", default=None)
    parser.add_argument(
        "--budgets", default="2048", help="tokens of a step beside decodes, at most 8192"
    )
    options = parser.parse_args()
    found: dict[str, object] = {"device": torch.cuda.get_device_name()}
    for part in options.parts.split(","):
        started = time.perf_counter()
        found[part] = PARTS[part](options)
        print(f"{part} took {time.perf_counter() - started:.0f} s", flush=True)
        options.out.write_text(json.dumps(found, indent=1))


def loads(options: argparse.Namespace, *, bursts: bool = True) -> dict[str, object]:
    """Tokens a second, TTFT and ITL under each load; the host's microseconds a decode step."""
    engine = _engine(options, 1280, 128)
    results = []
    scheduler = engine.loop.scheduler
    asked = [load for load in chosen(options.rates) if bursts or load.rate < math.inf]
    for budget, load in product(map(int, options.budgets.split(",")), asked):
        scheduler.max_tokens_per_step = budget
        talks, arrivals = load.draw(engine.config.vocab_size)
        engine.reset_prefix_cache()
        host = StepTimes(engine.loop)
        with host:
            done = LoadDriver(engine.loop).run(talks, arrivals)
        times = [one.timings for one in done.done]
        tokens = sum(len(one.token_ids) for one in done.done)
        ttft, itl = [one.ttft for one in times], [gap for one in times for gap in one.itl]
        result = summary(load.name, done.seconds, tokens, ttft, itl)
        result |= {"budget": float(budget)} | host.figures()
        results.append(result)
        print(line(result), flush=True)
        print(table(host.figures()), flush=True)
    return {"loads": results}


def cold(options: argparse.Namespace) -> dict[str, object]:
    """`loads`, but for bursts, which would warm the engine up."""
    return loads(options, bursts=False)


def host(options: argparse.Namespace) -> dict[str, object]:
    """Microseconds of the host in a decode step of 128 sequences, by what they are for: in the
    steady state as it is and with timers, and in a burst with timers.
    """
    engine = _engine(options, 1280, 128)
    loop, rng = engine.loop, np.random.default_rng(4)
    params = tw.SamplingParams(max_new_tokens=1100, ignore_eos=True)
    requests = [
        loop.submit(rng.integers(engine.config.vocab_size, size=32 + length).tolist(), params)
        for length in range(128)
    ]
    while loop._flight is None or loop._flight.plan.num_sequences < 128:
        loop.step()
    for _ in range(20):
        loop.step()
    whole = StepTimes(loop)
    with whole:
        for _ in range(300):
            loop.step()
    found = whole.figures()
    parts = _timed_parts(engine)
    timed = StepTimes(loop, parts=parts)
    with timed:
        for _ in range(300):
            loop.step()
    for request in requests:
        loop.cancel(request)
    burst = StepTimes(loop, parts=parts)
    talks, arrivals = chosen("")[1].draw(engine.config.vocab_size)
    engine.reset_prefix_cache()
    with burst:
        LoadDriver(loop).run(talks, arrivals)
    parts.stop()
    found |= {"timed": timed.figures(), "burst, timed": burst.figures()}
    found |= {f"call: {name}": value for name, value in queue_calls(engine).items()}
    numbers = {key: round(value, 1) for key, value in found.items() if isinstance(value, float)}
    print("host: " + json.dumps(numbers), flush=True)
    for name, figures in (
        ("steady", found),
        ("timed", timed.figures()),
        ("burst", burst.figures()),
    ):
        print(f"host, {name}:\n{table(figures)}", flush=True)
    return found


def _timed_parts(engine: CausalLMEngine) -> Parts:
    """Timers around all that a step consists of. Waiting for events is none of these."""
    loop, graphs, parts = engine.loop, engine.executor.graphs, Parts(time.perf_counter)
    launcher, rows = loop._launcher, engine.executor.rows
    assert launcher is not None and graphs is not None and rows is not None
    for owner, name, part in (
        (loop, "_step", "step"),
        (loop, "_ahead", "ahead"),
        (launcher, "plan_ahead", "plan"),
        (loop.scheduler, "schedule_ahead", "plan, schedule"),
        (loop.scheduler, "_survey", "plan, survey"),
        (loop.scheduler, "_plan_prompts", "plan, prompts"),
        (loop.pool, "extend", "plan, places"),
        (loop.pool, "_make_room", "plan, room made"),
        (launcher, "launch", "launch, and what counts it"),
        (launcher._batches, "build", "batch"),
        (launcher._batches, "_gather", "batch, tables"),
        (batch, "find_groups", "batch, groups"),
        (in_flight, "build_mixed", "batch, mixed"),
        (engine.executor, "launch", "launch, executor"),
        (engine.executor, "launch_mixed", "launch, mixed"),
        (engine.executor, "_run_mixed", "launch, mixed, Program"),
        (rows, "_fill", "launch, mixed, rows"),
        (graphs, "launch", "launch, graphs"),
        (graphs.metadata, "fill", "metadata"),
        (graphs.queue, "join", "queue: join"),
        (graphs.queue, "copy", "queue: copies (two)"),
        (graphs.queue, "replay", "queue: replay"),
        (graphs.queue, "record", "queue: record"),
        (launcher, "commit", "commit"),
        (loop.scheduler, "share", "commit, prompts shared"),
        (loop.scheduler, "drop", "commit, dropped"),
        (Launched, "tokens", "tokens taken"),
        (Lag, "settle", "sequences told"),
        (loop, "_count", "counters and observers"),
        (loop, "_drop_void", "void rows"),
    ):
        parts.timed(owner, name, part)
    return parts


def chunks(options: argparse.Namespace) -> dict[str, object]:
    """ITL of 16 decoding sequences while a long prompt is computed, by the step's token budget."""
    engine = _engine(options, LONG_PROMPT + 64, DECODING + 1)
    scheduler, rng = engine.loop.scheduler, np.random.default_rng(3)
    found: dict[str, object] = {}
    for name, budget in (("alone", 0), ("2048", 2048), ("512", 512), ("whole", LONG_PROMPT + 64)):
        for _ in range(2):  # the first captures what the second needs
            engine.reset_prefix_cache()
            scheduler.max_tokens_per_step = scheduler.max_prefill_tokens = budget or 2048
            result = _stalled(engine, rng, long=bool(budget))
        found[name] = result
        print(f"budget {name}: " + json.dumps(result), flush=True)
    return found


def _stalled(engine: CausalLMEngine, rng: np.random.Generator, *, long: bool) -> dict[str, float]:
    loop, vocab = engine.loop, engine.config.vocab_size
    params = tw.SamplingParams(max_new_tokens=700, ignore_eos=True)
    decoding = [
        loop.submit(rng.integers(vocab, size=128).tolist(), params) for _ in range(DECODING)
    ]
    while min(len(one.sequences[0].tokens) for one in decoding) < 160:
        loop.step()
    begin = loop.clock()
    prompt = rng.integers(vocab, size=LONG_PROMPT if long else 8).tolist()
    # For the p99 to be of the time that the prompt takes, others are looked at only until then.
    late = loop.submit(prompt, tw.SamplingParams(max_new_tokens=1, ignore_eos=True))
    seen = [[begin] for _ in decoding]
    counts = [len(one.sequences[0].tokens) for one in decoding]
    steps = 0
    while not late.finished or steps < 60:
        loop.step()
        steps += 1
        now = loop.clock()
        for index, one in enumerate(decoding):
            if len(one.sequences[0].tokens) > counts[index]:
                counts[index] = len(one.sequences[0].tokens)
                seen[index].append(now)
        if late.finished and long:
            break
    (done,) = late.completions()
    for one in decoding:
        loop.cancel(one)
    gaps = [b - a for times in seen for a, b in zip(times, times[1:], strict=False)]
    return {
        "itl_p50_ms": float(np.percentile(gaps, 50)) * 1e3,
        "itl_p99_ms": float(np.percentile(gaps, 99)) * 1e3,
        "itl_max_ms": max(gaps) * 1e3,
        "ttft_ms": done.timings.ttft * 1e3,
        "steps": steps,
    }


def forms(options: argparse.Namespace) -> dict[str, object]:
    """TPOT of 32 sequences of 128 tokens, free and of a form, in turns."""
    engine = _engine(options, 1280, 128)
    form = tw.StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    rng = np.random.default_rng(5)
    taken: dict[str, list[float]] = {"free": [], "form": []}
    typical: dict[str, list[float]] = {"free": [], "form": []}
    for turn in range(TURNS):
        free = tw.SamplingParams(max_new_tokens=200, ignore_eos=True, temperature=1.0, seed=turn)
        each = {"free": free, "form": replace(free, structured_outputs=form)}
        for name, params in each.items():
            engine.reset_prefix_cache()
            prompts = [rng.integers(1000, 40_000, size=64).tolist() for _ in range(32)]
            completions = engine.generate(prompts, params)
            # Behind the forced tokens at the beginning, which are computed in chunks.
            gaps = [gap for one in completions for gap in one.timings.itl[40:]]
            if turn and gaps:
                taken[name].append(statistics.mean(gaps) * 1e3)
                typical[name].append(statistics.median(gaps) * 1e3)
    ratios = [b / a for a, b in zip(taken["free"], taken["form"], strict=True)]
    result = {name: statistics.median(values) for name, values in taken.items()}
    result["ratio"] = statistics.median(ratios)
    result |= {f"{name}, p50": statistics.median(values) for name, values in typical.items()}
    print("forms: " + json.dumps(result), flush=True)
    found = {"itl_ms": result, "ratios": ratios, "device": {}}
    times = DeviceTimes(engine)
    for name, params in each.items():
        engine.generate(prompts, params)
        found["device"][name] = times.figures()
        print(f"device, {name}: " + json.dumps(found["device"][name]), flush=True)
    _MADE.clear()  # it is looked at from now on
    return found


def prefix(options: argparse.Namespace) -> dict[str, object]:
    """TTFT and requests a second of prompts that share a prefix, in turns; the prefix is known."""
    engine = _engine(options, 1280, 128)
    rng, loop = np.random.default_rng(6), engine.loop
    vocab, params = engine.config.vocab_size, tw.SamplingParams(max_new_tokens=32, ignore_eos=True)
    taken: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for _ in range(TURNS // 2):
        shared = rng.integers(vocab, size=922).tolist()
        prompts = [shared + rng.integers(vocab, size=102).tolist() for _ in range(64)]
        for name, results in taken.items():
            engine.reset_prefix_cache()
            loop.scheduler.reuses = name == "with"
            engine.generate([shared], tw.SamplingParams(max_new_tokens=1))
            started = loop.clock()
            completions = engine.generate(prompts, params)
            seconds = loop.clock() - started
            ttft = statistics.median(one.timings.ttft for one in completions)
            cached = statistics.mean(one.usage.cached_tokens for one in completions)
            results.append({"ttft": ttft, "rate": 64 / seconds, "cached": cached})
    loop.scheduler.reuses = True
    pairs = list(zip(taken["without"], taken["with"], strict=True))[1:]
    result = {
        "ttft_ratio": statistics.median(b["ttft"] / a["ttft"] for a, b in pairs),
        "throughput_ratio": statistics.median(b["rate"] / a["rate"] for a, b in pairs),
    }
    print("prefix: " + json.dumps(result | pairs[-1][1]), flush=True)
    return {"ratios": result, "turns": taken}


def _engine(options: argparse.Namespace, length: int, sequences: int) -> CausalLMEngine:
    """The last one, if it will do: two have no room."""
    if (length, sequences) in _MADE:
        return _MADE[length, sequences]
    _MADE.clear()
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()
    started = time.perf_counter()
    engine = tw.compile(
        options.config,
        random_weights=0,
        quantize=options.quantize,
        dtype="bfloat16",
        max_model_len=length,
        max_batch_size=sequences,
        verify="structure",
    )
    assert isinstance(engine, CausalLMEngine)
    engine.warm_up()
    freeze()  # as `tilewright serve` does
    print(f"ready in {time.perf_counter() - started:.0f} s", flush=True)
    _MADE[length, sequences] = engine
    return engine


PARTS = {
    "loads": loads,
    "cold": cold,
    "host": host,
    "chunks": chunks,
    "forms": forms,
    "prefix": prefix,
}

if __name__ == "__main__":
    main()

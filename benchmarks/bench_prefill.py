"""Time to the first token of one prompt on a GPU, and where it goes.

    python benchmarks/bench_prefill.py ENGINE_OR_CONFIG [--quantize fp8] [--lengths 512,4096]

For each length: the median of some prompts; then, from torch's profiler, how long the host takes to
the first kernel, how long the GPU works and waits between kernels, and how long the token takes
back; then the kernels that take most. The profiler costs the host time, not the kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import tilewright as tw
from tilewright.compiler.bench.trace import Event, covered
from tilewright.runtime.engine import CausalLMEngine

RANGE = "tilewright_prompt"


@dataclass(frozen=True)
class Prefill:
    """One length; times in milliseconds, medians.

    Attributes:
        tokens: of the prompt.
        ttft: from the call to the first token, without the profiler.
        least: the shortest of them.
        head, busy, idle, tail: of a profiled prompt: before the first kernel, with a kernel
            running, between kernels, behind the last one.
        launches: kernels and copies.
        kernels: (name, launches, milliseconds), most time first.
    """

    tokens: int
    ttft: float
    least: float
    head: float
    busy: float
    idle: float
    tail: float
    launches: int
    kernels: list[tuple[str, int, float]]


def main() -> None:
    """Compiles, measures, prints."""
    options = _options()
    started = time.perf_counter()
    engine = _engine(options)
    print(f"ready in {time.perf_counter() - started:.0f} s", flush=True)
    found = [measure(engine, length, options.rounds) for length in options.lengths]
    for one in found:
        show(one, options.kernels)
    if options.json is not None:
        device = torch.cuda.get_device_name()
        rows = {"device": device, "quantize": options.quantize, "prefill": list(map(asdict, found))}
        options.json.write_text(json.dumps(rows, indent=1))


def _engine(options: argparse.Namespace) -> CausalLMEngine:
    if (Path(options.model) / "manifest.json").is_file():
        found = tw.load(options.model)
    else:
        found = tw.compile(
            options.model,
            random_weights=0,
            quantize=options.quantize,
            dtype="bfloat16",
            max_model_len=max(8192, *options.lengths) + 128,
            max_batch_size=options.batch,
            verify="structure",
        )
    assert isinstance(found, CausalLMEngine)
    return found


def measure(engine: CausalLMEngine, length: int, rounds: int) -> Prefill:
    """Prompts of this length, each another one, so that none is found in a cache."""
    params = tw.SamplingParams(max_new_tokens=1, ignore_eos=True)
    generator = torch.Generator().manual_seed(length)

    def prompt() -> list[int]:
        vocab = engine.config.vocab_size
        return torch.randint(vocab, (length,), generator=generator).tolist()  # type: ignore[no-any-return]

    for _ in range(3):
        engine.generate([prompt()], params)
    times = []
    for _ in range(rounds):
        tokens = prompt()
        torch.cuda.synchronize()
        began = time.perf_counter()
        engine.generate([tokens], params)
        times.append(1e3 * (time.perf_counter() - began))
    runs = [_profiled(engine, prompt(), params) for _ in range(3)]
    parts = [_parts(*run) for run in runs]
    head, busy, idle, tail = (statistics.median(each) for each in zip(*parts, strict=True))
    events = runs[-1][0]
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(1e3 * event.seconds)
    kernels = [(name, len(each), sum(each)) for name, each in by_name.items()]
    kernels.sort(key=lambda kernel: -kernel[2])
    return Prefill(
        length,
        statistics.median(times),
        min(times),
        head,
        busy,
        idle,
        tail,
        len(events),
        kernels,
    )


def show(one: Prefill, kernels: int) -> None:
    """A few lines."""
    print(
        f"{one.tokens} tokens: TTFT {one.ttft:.2f} ms (least {one.least:.2f}); "
        f"head {one.head:.2f}, busy {one.busy:.2f}, idle {one.idle:.2f}, tail {one.tail:.2f}; "
        f"{one.launches} launches"
    )
    for name, launches, milliseconds in one.kernels[:kernels]:
        print(f"   {milliseconds:7.3f} ms {launches:5d} x {name[:100]}")


def _profiled(
    engine: CausalLMEngine, prompt: list[int], params: tw.SamplingParams
) -> tuple[list[Event], float, float]:
    """What ran on the device, and when the host began and ended, on one clock in seconds."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        engine.reset_prefix_cache()
        torch.cuda.synchronize()
        with record_function(RANGE):
            engine.generate([prompt], params)
        torch.cuda.synchronize()
    device, span = [], (0.0, 0.0)
    for event in profiler.events() or ():
        begin, seconds = event.time_range.start / 1e6, event.time_range.elapsed_us() / 1e6
        if event.name == RANGE:
            if event.device_type == DeviceType.CPU:
                span = (begin, begin + seconds)
        elif event.device_type == DeviceType.CUDA:
            device.append(Event(event.name, begin, seconds))
    return sorted(device, key=lambda event: event.start), *span


def _parts(events: Sequence[Event], begin: float, end: float) -> tuple[float, ...]:
    first, last = events[0].start, max(event.end for event in events)
    busy = covered(events, first, last)
    return tuple(1e3 * part for part in (first - begin, busy, last - first - busy, end - last))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="an engine, or a folder with a config.json: random weights")
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kernels", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(lengths=[512, 4096])
    return parser.parse_args()


if __name__ == "__main__":
    main()

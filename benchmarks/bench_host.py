"""What the host does in a decode step, by part, without a device.

    python benchmarks/bench_host.py [--sequences 128] [--steps 400] [--json]
    python benchmarks/bench_host.py --bursts [--cold] [--timed] [--json]

The real loop, scheduler, pool and launcher, and the metadata of steps as it is written on a GPU,
over an executor that makes random tokens up at once. Sequences have lengths of their own, so that
they cross pages at different steps, and as large a context as 1280 tokens. In the steady state: the
same sequences, one token each. Each part is told without those inside it; medians and minima over
steps, in microseconds of the thread on a core: what others take of a shared machine does not count.

Kinds: `greedy` without a tokenizer; `drawn` with a random number a row; `text` with a tokenizer;
`stops` with a stop string beside; `streams` with text that is taken behind each step (not counted);
`forms` with a JSON schema (`--sequences 32` is what the bar is for). There `masks` and `commit` lie
between a token and the next one's sampling; both have to end while the device computes a step.

`--bursts`: steps by what they hold, on the clock (`step_times.py`), as `bench_serving.py` has them:
`burst`, prompts of 1024 tokens that come at once, 8 a step, and 128 tokens of each; `alike`, all of
one length from the first step on, so that all cross a page in the same steps; `full`, as `burst`
with the pool full of prefixes that others have left. `--cold` flushes the caches between steps: a
host beside a GPU, which waits for milliseconds in between, lies between the two. `--timed` tells
what a step consists of.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from host_parts import Parts
from step_times import StepTimes, table
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from tilewright.formats.tokenizer import Tokenizer, TokenizerConfig
from tilewright.runtime import (
    Capabilities,
    GenerationLoop,
    PagedPool,
    Sampler,
    SamplingParams,
    Scheduler,
    Step,
    StructuredOutputsParams,
)
from tilewright.runtime.batch import DecodeBatch, MixedBatch
from tilewright.runtime.bucketing import Padding
from tilewright.runtime.decode_buffer import DecodeBuffer, Launched, Turn
from tilewright.runtime.device_queue import ImmediateQueue
from tilewright.runtime.grammar import Grammars, fill_masks
from tilewright.runtime.metrics import Metrics
from tilewright.runtime.step_buffer import SAMPLING, StepShape
from tilewright.runtime.token_choice import Masks

PAGE, CONTEXT, VOCAB, FIRST = 16, 1280, 4000, 8  # tokens; ids; steps before those that count
FIELDS = ("token_ids", "positions", "slot_mapping", "seq_lens", "block_tables", *SAMPLING)
SCHEMA = {
    "type": "object",
    "properties": {"notes": {"type": "array", "items": {"type": "string"}, "minItems": 900}},
    "required": ["notes"],
    "additionalProperties": False,
}
KINDS = {
    "greedy": SamplingParams(ignore_eos=True, max_new_tokens=CONTEXT),
    "drawn": SamplingParams(ignore_eos=True, max_new_tokens=CONTEXT, temperature=1.0),
    "text": SamplingParams(max_new_tokens=CONTEXT),
    "stops": SamplingParams(max_new_tokens=CONTEXT, stop=["never seen"]),
    "streams": SamplingParams(max_new_tokens=CONTEXT),
    "forms": SamplingParams(
        max_new_tokens=CONTEXT,
        ignore_eos=True,
        structured_outputs=StructuredOutputsParams(json=SCHEMA),
    ),
}


BURSTS = ("burst", "alike", "full")
_CACHES = 40 << 20  # bytes; more than a core has for itself


class RandomTokens:
    """Steps that are no work, but for what is written for them."""

    padding = Padding()

    def __init__(self, sequences: int, mixed: int = 0) -> None:
        self.capabilities = Capabilities(
            mixes=True,
            pages=True,
            shares=True,
            max_slots=None,
            samples=sequences,
            samples_mixed=mixed,
        )
        self._shape = StepShape(sequences, sequences, CONTEXT // PAGE, sequences)
        self._buffer = DecodeBuffer(self._shape, FIELDS, torch.device("cpu"), ImmediateQueue())
        random = np.random.default_rng(0)
        self._drawn = itertools.cycle(random.integers(3, VOCAB, size=(64, sequences)))
        self._tokens = torch.zeros(sequences, dtype=torch.int64)
        self._last: Launched | None = None
        self._random = np.random.default_rng(2)
        self.drawing = 0.0  # seconds, which are no part of a step

    def allocate(self, num_pages: int, page_size: int, host_pages: int = 0) -> None:
        """Nothing to allocate."""

    def copy_pages(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Nothing to copy."""

    def recover(self) -> None:
        """Nothing is given up."""

    def run(self, step: Step) -> torch.Tensor:
        """Token 2 for all that may have it."""
        self._last = None
        logits = torch.zeros(1, VOCAB)
        logits[0, 2] = 1
        return logits.expand(len(step.logits_indices), VOCAB)

    def launch(self, batch: DecodeBatch, after: Launched | None) -> Launched:
        """Writes what a step is told, and its tokens."""
        count = len(batch.positions)
        turn = self._buffer.fill(batch, self._shape)
        turn.numpy_tokens[:count] = next(self._drawn)[:count]
        turn.event, turn.busy = self._buffer.queue.record(turn.event), False
        turn.launched = self._last = Launched(turn, count, self._tokens)
        self._last.open = batch.held
        return self._last

    def launch_mixed(self, batch: MixedBatch, after: Launched | None) -> Launched:
        """Tokens of those that complete."""
        count = len(batch.key)
        turn = Turn(1, max(count, 1), torch.device("cpu"))
        turn.numpy_tokens[:count] = next(self._drawn)[:count]
        turn.event = self._buffer.queue.record(None)
        self._last = Launched(turn, count, self._tokens)
        return self._last

    def choose(self, launched: Launched, masks: Masks) -> None:
        """A token of those that may come; a block of masks is written as for a GPU."""
        turn = launched._turn
        fill_masks(masks, turn.words(-(-VOCAB // 32)).numpy())
        started = time.thread_time()
        for row, mask in enumerate(masks):
            if mask is not None:
                (tokens,) = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()
                turn.numpy_tokens[row] = self._random.choice(tokens)
        launched.open = False
        self.drawing += time.thread_time() - started

    def follows(self, launched: Launched) -> bool:
        """Whether it was the last."""
        return self._last is launched


def tokenizer() -> Tokenizer:
    """Of bytes, trained on what lies beside this file, end of sequence 0."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([(Path(__file__).parent / "NOTES.md").read_text("utf-8")], trainer)
    return Tokenizer(backend, TokenizerConfig((0,)))


def loop_of(kind: str, sequences: int) -> GenerationLoop:
    """A loop in the steady state, with its metrics."""
    executor = RandomTokens(sequences)
    pool = PagedPool(sequences * CONTEXT // PAGE + 1, PAGE)
    scheduler = Scheduler(pool, executor.capabilities, max_num_seqs=sequences)
    words = None if kind in ("greedy", "drawn") else tokenizer()
    forms = Grammars(words, [0], VOCAB) if words is not None and kind == "forms" else None
    loop = GenerationLoop(executor, pool, scheduler, Sampler(), words, [0], CONTEXT, grammars=forms)
    Metrics(loop, "none")
    if words is not None:  # as once a server has run for a while
        stream = words.stream()
        for token in range(VOCAB):
            stream.push(token)
    rng = np.random.default_rng(1)
    for row in range(sequences):
        prompt = rng.integers(3, VOCAB, size=1 + 5 * row % 640).tolist()
        loop.add(loop.prepare(prompt, KINDS[kind], streams=kind == "streams"))
    flight = loop._flight
    while flight is None or flight.num_tokens < sequences:
        loop.step()
        flight = loop._flight
    return loop


def timed_parts(loop: GenerationLoop, parts: Parts) -> Parts:
    """Timers around what a step consists of."""
    launcher = loop._launcher
    assert launcher is not None
    for owner, name, part in (
        (loop.scheduler, "schedule_ahead", "plan"),
        (loop.pool, "extend", "places"),
        (launcher, "launch", "launch, and what counts it"),
        (launcher._batches, "build", "batch"),
        (loop.executor, "launch", "metadata"),
        (launcher, "choose", "masks"),
        (loop.executor, "choose", "masks written, and tokens drawn"),
        (launcher, "commit", "commit"),
        (loop, "_count", "counters and observers"),
        (loop, "_drop_void", "void rows"),
        (loop, "_step", "rest"),
    ):
        parts.timed(owner, name, part)
    return parts


def measure(kind: str, sequences: int, steps: int) -> dict[str, tuple[float, float]]:
    """Median and least microseconds of each part, and of all of a step untouched by timers."""
    loop = loop_of(kind, sequences)
    requests = [seq.request for seq in loop.scheduler.running]

    def step() -> float:
        start, drawn = time.thread_time(), loop.executor.drawing
        loop.step()
        taken = time.thread_time() - start - (loop.executor.drawing - drawn)
        for request in requests:
            request.take_deltas()
        return taken

    for _ in range(FIRST):
        step()
    whole = [step() for _ in range(steps // 2)]
    parts = timed_parts(loop, Parts())
    for _ in range(steps // 2):
        step()
    assert all(not request.finished for request in requests) and not loop.scheduler.waiting
    found = parts.seconds | {"a step": whole}
    return {
        part: (statistics.median(times) * 1e6, min(times) * 1e6) for part, times in found.items()
    }


def bursts(name: str, sequences: int, *, cold: bool, timed: bool) -> dict[str, Any]:
    """Figures of steps (`StepTimes.figures`) of one load of greedy requests without a tokenizer."""
    executor = RandomTokens(sequences, sequences)
    pool = PagedPool(sequences * CONTEXT // PAGE + 1, PAGE, prefix_caching=True)
    budget = 64 * sequences  # 8 prompts of 1024 tokens of 128
    scheduler = Scheduler(
        pool, executor.capabilities, max_num_seqs=sequences, max_prefill_tokens=budget
    )
    loop = GenerationLoop(executor, pool, scheduler, Sampler(), None, [0], CONTEXT)
    parts = timed_parts(loop, Parts(time.perf_counter)) if timed else None
    rng = np.random.default_rng(1)
    length, tokens = (16, 1000) if name == "alike" else (1024, 128)
    for _ in range(1 + (name == "full")):
        for _ in range(sequences):
            prompt = rng.integers(3, VOCAB, size=length).tolist()
            loop.submit(prompt, SamplingParams(ignore_eos=True, max_new_tokens=tokens))
        flushed = np.zeros(_CACHES if cold else 1, dtype=np.uint8)
        times = StepTimes(loop, sequences * 100 // 128, parts)
        with times:
            while scheduler.waiting or scheduler.running or loop._flight is not None:
                flushed += 1
                loop.step()
    return times.figures()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--kinds", nargs="*", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--bursts", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--timed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # others' work on the cores would be waited for
    if options.bursts:
        knobs = {"cold": options.cold, "timed": options.timed}
        loads = {name: bursts(name, options.sequences, **knobs) for name in BURSTS}
        each = (f"{name}: p50 {one['host_us']:.0f}\n{table(one)}" for name, one in loads.items())
        print(json.dumps(loads, indent=1) if options.json else "\n".join(each))
        return
    found = {kind: measure(kind, options.sequences, options.steps) for kind in options.kinds}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{options.sequences} sequences, µs, median (least)")
    print("part".ljust(30) + "".join(kind.rjust(16) for kind in found))
    for part in dict.fromkeys(part for one in found.values() for part in one):
        each = [one.get(part, (0, 0)) for one in found.values()]
        cells = [f"{median:.0f} ({least:.0f})" for median, least in each]
        print(part.ljust(30) + "".join(cell.rjust(16) for cell in cells))


if __name__ == "__main__":
    main()

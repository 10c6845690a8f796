"""Latency of one request: an engine beside the uncompiled model, torch.compile, and the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...errors import UsageError
from ...runtime.engine import CausalLMEngine
from ...runtime.params import SamplingParams
from ...settings import current
from .bars import FLOOR, Bar, find_bars
from .contenders import Run, synchronize
from .entrants import Entrant, Series, enter_all
from .floor import make_floor
from .machine import Machine, probe_machine
from .reference import ReferenceModel
from .statistics import Ratio, paired_ratio
from .trace import Trace, trace_decode

Advance = Callable[[str, float], None]
TRACED_STEPS = 8


@dataclass(frozen=True, slots=True)
class Rival:
    """A contender's figures, and ours over them.

    Attributes:
        name, label: for options and for reading.
        series: its runs; None where it failed.
        error: why it failed.
        is_absent: whether that is because it is not installed.
        first_steps: seconds of the first decode steps, which compile and capture; not measured.
        decode, prefill: ours over its, tokens a second.
        agreeing_tokens: how many of the first tokens are the same; None with random weights.
    """

    name: str
    label: str
    series: Series | None
    error: str | None = None
    is_absent: bool = False
    first_steps: tuple[float, ...] = ()
    decode: Ratio | None = None
    prefill: Ratio | None = None
    agreeing_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """What ``bench latency`` found.

    Attributes:
        machine: load and rates.
        dtype: of the engine's weights, and of the contenders.
        prompt_tokens, new_tokens, repeat: what was run.
        random_weights: whether the contenders have weights of their own, so that tokens differ.
        ours: the engine's runs.
        rivals: what it was compared with.
        floor_decode, floor_prefill: tokens a second of the matmuls alone: on a CPU run by
            onnxruntime, on a GPU by its read and matmul rates; None where the model has none.
        bytes_per_token: that a decode step must read: the weights of its linears, and the KV
            cache as it is half way.
        trace: kernels and gaps of a decode step, on a GPU; a text says why there is none.
    """

    machine: Machine
    dtype: str
    prompt_tokens: int
    new_tokens: int
    repeat: int
    random_weights: bool
    ours: Series
    rivals: tuple[Rival, ...]
    floor_decode: float | None
    floor_prefill: float | None
    bytes_per_token: int
    trace: Trace | str | None

    @property
    def mbu(self) -> float:
        """Model bandwidth utilisation of decode: bytes that must be read over the most readable."""
        return self.bytes_per_token / self.ours.itl / self.machine.read_bytes_per_second

    @property
    def eager(self) -> Series | None:
        """The uncompiled model's runs, where it was asked for and did not fail."""
        return next((rival.series for rival in self.rivals if rival.name == "eager"), None)

    @property
    def agreeing_tokens(self) -> int | None:
        """How many of the first tokens are the uncompiled model's; None without it."""
        return next((r.agreeing_tokens for r in self.rivals if r.name == "eager"), None)

    @property
    def fastest(self) -> Rival | None:
        """The contender that decodes fastest, of those that ran."""
        ran = [rival for rival in self.rivals if rival.decode is not None]
        return min(ran, key=lambda rival: rival.decode.value, default=None)  # type: ignore[union-attr]

    def bars(self) -> list[tuple[Bar, Ratio, bool]]:
        """The bars of this device and model whose contender was measured: (bar, ratio, whether it
        is met).
        """
        rivals = {rival.name: rival for rival in self.rivals}
        found = []
        for bar in find_bars(self.machine.device, self.bytes_per_token):
            ratio = getattr(rivals.get(bar.against), bar.phase, None)
            if bar.against == FLOOR and self.floor_decode is not None:
                ratio = paired_ratio(self.ours.decode, [self.floor_decode] * len(self.ours.decode))
            if ratio is not None:
                found.append((bar, ratio, ratio.value >= bar.value))
        return found


def measure_latency(
    engine: CausalLMEngine,
    reference: Callable[[], ReferenceModel] | None,
    *,
    compare: Sequence[str] = ("eager",),
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repeat: int = 5,
    advance: Advance = lambda phase, share: None,
) -> Latency:
    """Measures greedy decoding of one random prompt, batch 1.

    Runs alternate (ours, torch.compile, eager, ours, …), so that drift of the machine hits all
    alike; the first run of each is not counted. A contender that fails is reported, not raised.

    Args:
        engine: what to measure.
        reference: makes the uncompiled model that all contenders run; None to measure ours alone.
        compare: names of contenders (``contenders.NAMES``).
        prompt_tokens, new_tokens: lengths; together within the engine's context.
        repeat: measured runs of each.
        advance: told what runs, and the share that is done.

    Raises:
        UsageError: lengths that do not fit, or are too small to measure.
    """
    _check(engine, prompt_tokens, new_tokens, repeat)
    device = torch.device(engine.target.device_type)
    with bench_threads():
        advance("measuring the machine", 0.0)
        machine = probe_machine(str(engine.target), device)
        floor = make_floor(engine, machine, prompt_tokens, new_tokens)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(
            engine.config.vocab_size, (prompt_tokens,), generator=generator
        ).tolist()
        ours = Entrant("tilewright", "tilewright", _ours(engine, device))
        advance("warming up", 0.02)
        ours.go(prompt, new_tokens)  # before the others take memory
        ours.runs.clear()
        advance("preparing the contenders", 0.03)
        model, rivals = enter_all(reference, compare, prompt, new_tokens)
        for index in range(repeat + 1):
            for which, entrant in enumerate((ours, *rivals)):
                share = (index + which / (1 + len(rivals))) / (repeat + 1)
                advance(entrant.name, 0.1 + 0.9 * share)
                entrant.go(prompt, new_tokens)
            floor.measure()
        steps = min(TRACED_STEPS, new_tokens - 1)
        trace = trace_decode(engine, prompt, steps) if device.type == "cuda" else None
    mine = ours.series(prompt_tokens)
    assert mine is not None
    is_random = model is not None and model.has_random_weights
    return Latency(
        machine,
        str(engine_dtype(engine)).removeprefix("torch."),
        prompt_tokens,
        new_tokens,
        repeat,
        is_random,
        mine,
        tuple(_rival(mine, rival, prompt_tokens, is_random) for rival in rivals),
        floor.decode,
        floor.prefill,
        floor.bytes_per_token,
        trace,
    )


@contextmanager
def bench_threads() -> Iterator[None]:
    """As many torch threads as TILEWRIGHT_THREADS says, for all contenders."""
    before, wanted = torch.get_num_threads(), current().threads
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def engine_dtype(engine: CausalLMEngine) -> torch.dtype:
    """The element type that most of the engine's weights have, of those that models compute in;
    bfloat16 where they are all quantized.
    """
    counts: dict[torch.dtype, int] = {}
    for buffer in engine.image.program.weights:
        type_ = engine.image.program.buffers[buffer]
        if type_.dtype.is_float and not type_.dtype.is_float8:
            numel = type_.numel
            count = numel if isinstance(numel, int) else 0
            counts[type_.dtype.torch] = counts.get(type_.dtype.torch, 0) + count
    return max(counts, key=lambda dtype: counts[dtype], default=torch.bfloat16)


def _check(engine: CausalLMEngine, prompt_tokens: int, new_tokens: int, repeat: int) -> None:
    for name, value, least in (
        ("--prompt-tokens", prompt_tokens, 1),
        ("--new-tokens", new_tokens, 2),
        ("--repeat", repeat, 1),
    ):
        if value < least:
            raise UsageError(
                f"option {name}",
                expected=f"an integer, {least} or more",
                found=str(value),
                remedy="Raise it, or leave it out.",
            )
    limit = engine.config.max_model_len
    if prompt_tokens + new_tokens > limit:
        raise UsageError(
            "options --prompt-tokens and --new-tokens",
            expected=f"at most {limit} together, the engine's context",
            found=f"{prompt_tokens} + {new_tokens}",
            remedy="Lower them, or compile with a larger --max-model-len.",
        )


def _ours(engine: CausalLMEngine, device: torch.device) -> Callable[[list[int], int], Run]:
    def run(prompt: list[int], new_tokens: int) -> Run:
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        synchronize(device)  # what a contender left behind is not ours
        engine.reset_prefix_cache()
        completion = engine.generate([prompt], params)[0]
        return Run(completion.token_ids, completion.timings.ttft, completion.timings.itl)

    return run


def _rival(ours: Series, entrant: Entrant, prompt_tokens: int, random_weights: bool) -> Rival:
    series = entrant.series(prompt_tokens)
    if series is None:
        error = entrant.error or "it did not run"
        return Rival(
            entrant.name, entrant.label, None, error, entrant.is_absent, entrant.first_steps
        )
    return Rival(
        entrant.name,
        entrant.label,
        series,
        first_steps=entrant.first_steps,
        decode=paired_ratio(ours.decode, series.decode),
        prefill=paired_ratio(ours.prefill, series.prefill),
        agreeing_tokens=None if random_weights else _agreeing(ours.token_ids, series.token_ids),
    )


def _agreeing(ours: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = list(zip(ours, theirs, strict=True))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

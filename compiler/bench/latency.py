"""Latency of one request: an engine beside the uncompiled model and the floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...errors import UsageError
from ...runtime.engine import CausalLMEngine
from ...runtime.params import SamplingParams
from ...settings import current
from ..inspect.facts import Setting, bindings, final_graph, kv_bytes_per_token
from .floor import MatmulFloor, find_linears
from .machine import Machine, probe_machine
from .reference import ReferenceModel, Run
from .statistics import Ratio, paired_ratio

Advance = Callable[[str, float], None]
DECODE_BAR, PREFILL_BAR = 1.65, 1.0  # shares of Hugging Face eager at float32, on a CPU


@dataclass(frozen=True, slots=True)
class Series:
    """One contender's runs, all of the same prompt and length.

    Attributes:
        name: "tilewright" or "eager".
        prefill: prompt tokens a second, one figure a run.
        decode: new tokens a second after the first, one figure a run.
        ttft: median seconds to the first token.
        itl: median seconds between tokens, over all runs.
        token_ids: of the last run.
    """

    name: str
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    ttft: float
    itl: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Latency:
    """What ``bench latency`` found.

    Attributes:
        machine: load and read rate.
        prompt_tokens, new_tokens, repeat: what was run.
        ours, eager: the contenders; eager where it was asked for.
        decode_ratio, prefill_ratio: ours over eager's.
        agreeing_tokens: how many of the first tokens are the same, of new_tokens.
        floor_decode, floor_prefill: tokens a second of the matmuls alone in onnxruntime; None
            where the model has none.
        bytes_per_token: that a decode step must read: the weights of its linears, and the KV
            cache as it is half way.
    """

    machine: Machine
    prompt_tokens: int
    new_tokens: int
    repeat: int
    ours: Series
    eager: Series | None
    decode_ratio: Ratio | None
    prefill_ratio: Ratio | None
    agreeing_tokens: int | None
    floor_decode: float | None
    floor_prefill: float | None
    bytes_per_token: int

    @property
    def mbu(self) -> float:
        """Model bandwidth utilisation of decode: bytes that must be read over the most readable."""
        return self.bytes_per_token / self.ours.itl / self.machine.read_bytes_per_second


def measure_latency(
    engine: CausalLMEngine,
    reference: Callable[[], ReferenceModel] | None,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repeat: int = 5,
    advance: Advance = lambda phase, share: None,
) -> Latency:
    """Measures greedy decoding of one random prompt, batch 1.

    With a reference, runs alternate (ours, eager, ours, eager, …), so that drift of the machine
    hits both alike; the first run of each is not counted.

    Args:
        engine: what to measure.
        reference: makes the uncompiled model, None to measure ours alone.
        prompt_tokens, new_tokens: lengths; together within the engine's context.
        repeat: measured runs of each.
        advance: told what runs, and the share that is done.

    Raises:
        UsageError: lengths that do not fit, or are too small to measure.
    """
    _check(engine, prompt_tokens, new_tokens, repeat)
    with bench_threads():
        advance("probing memory", 0.0)
        machine = probe_machine()
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(engine.config.vocab_size, (prompt_tokens,), generator=generator)
        contenders = [_ours(engine)]
        if reference is not None:
            advance("loading the uncompiled model", 0.02)
            contenders.append(reference().run)
        runs: list[list[Run]] = [[] for _ in contenders]
        floor = _floor(engine, prompt_tokens, new_tokens, machine.threads)
        floors: list[tuple[float, float]] = []
        for index in range(repeat + 1):
            for which, run in enumerate(contenders):
                share = (index + which / len(contenders)) / (repeat + 1)
                advance(("ours", "eager")[which], 0.05 + 0.95 * share)
                runs[which].append(run(prompt.tolist(), new_tokens))
            if floor is not None:
                floors.append((floor.seconds("decode", 16), floor.seconds("prefill")))
        ours = _series("tilewright", runs[0][1:], prompt_tokens)
        eager = _series("eager", runs[1][1:], prompt_tokens) if reference is not None else None
    context = prompt_tokens + new_tokens // 2
    return Latency(
        machine,
        prompt_tokens,
        new_tokens,
        repeat,
        ours,
        eager,
        None if eager is None else paired_ratio(ours.decode, eager.decode),
        None if eager is None else paired_ratio(ours.prefill, eager.prefill),
        None if eager is None else _agreeing(ours.token_ids, eager.token_ids),
        statistics.median(1 / decode for decode, _ in floors) if floors else None,
        statistics.median(prompt_tokens / prefill for _, prefill in floors) if floors else None,
        _bytes_per_token(engine, context),
    )


@contextmanager
def bench_threads() -> Iterator[None]:
    """As many torch threads as TILEWRIGHT_THREADS says, for both contenders."""
    before, wanted = torch.get_num_threads(), current().threads
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def _ours(engine: CausalLMEngine) -> Callable[[list[int], int], Run]:
    def run(prompt: list[int], new_tokens: int) -> Run:
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        completion = engine.generate([prompt], params)[0]
        return Run(completion.token_ids, completion.timings.ttft, completion.timings.itl)

    return run


def _series(name: str, runs: Sequence[Run], prompt_tokens: int) -> Series:
    return Series(
        name,
        tuple(prompt_tokens / run.ttft for run in runs),
        tuple(len(run.itl) / sum(run.itl) for run in runs),
        statistics.median(run.ttft for run in runs),
        statistics.median(seconds for run in runs for seconds in run.itl),
        tuple(runs[-1].token_ids),
    )


def _agreeing(ours: Sequence[int], eager: Sequence[int]) -> int:
    pairs = list(zip(ours, eager, strict=True))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _floor(
    engine: CausalLMEngine, prompt_tokens: int, new_tokens: int, threads: int
) -> MatmulFloor | None:
    """The matmuls alone, None for a model without any."""
    graph = final_graph(engine.image)
    steps = {
        name: bindings(graph, engine.image, Setting(name, tokens, prompt_tokens + new_tokens))
        for name, tokens in (("decode", 1), ("prefill", prompt_tokens))
    }
    if not find_linears(graph, steps["decode"]):
        return None
    return MatmulFloor(graph, steps, threads)


def _bytes_per_token(engine: CausalLMEngine, context: int) -> int:
    graph = final_graph(engine.image)
    sizes = bindings(graph, engine.image, Setting("decode", 1, context))
    element = next(iter(graph.params)).dtype.bytes if graph.params else 4
    linears = sum(one.n * one.k * element for one in find_linears(graph, sizes))
    return linears + kv_bytes_per_token(engine.image) * context

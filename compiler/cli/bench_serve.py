"""``tilewright bench serve``: an engine under a load of many requests, in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from .bench_options import probe, warn_if_busy
from .bench_serve_view import print_serving, serving_data
from .console import print_json, progress
from .options import (
    BackendOption,
    CheckpointOption,
    ContextOption,
    EngineOrModel,
    JsonOption,
    TraceOption,
    check_places,
    is_engine,
    open_causal_lm,
    traced,
)

if TYPE_CHECKING:
    from ...runtime.engine import CausalLMEngine
    from ..bench.workloads import Conversation, Shape

WORKLOADS = ("random", "shared-prefix", "multi-turn", "file")
SHARED, TURNS = 0.9, 4  # of the workloads that are named after them
MOST_SEQUENCES = 128  # at once, of a model that is compiled for this
CONTEXT_MULTIPLE = 64

Rate = Annotated[
    float, typer.Option(help="Requests a second, arriving at random (Poisson); inf: all at once.")
]
Fixed = Annotated[bool, typer.Option("--fixed", help="Arrive at even distances instead.")]
Concurrency = Annotated[
    int | None, typer.Option(help="Most requests at once: others are held back.", min=1)
]
Workload = Annotated[str, typer.Option(help=f"{', '.join(WORKLOADS)}.")]
Requests = Annotated[int, typer.Option("--num-prompts", help="Requests.", min=1)]
InputLength = Annotated[int, typer.Option("--input-len", help="Tokens of a prompt.", min=1)]
OutputLength = Annotated[int, typer.Option("--output-len", help="Tokens of an answer.", min=1)]
Spread = Annotated[
    float, typer.Option(help="Lengths vary by this share, up and down, uniformly.", min=0, max=1)
]
Shared = Annotated[
    float | None,
    typer.Option(help="Share of a prompt that others have too; shared-prefix: 0.9.", min=0, max=1),
]
Prefixes = Annotated[int, typer.Option(help="How many such beginnings there are.", min=1)]
Turns = Annotated[
    int | None, typer.Option(help="Requests of a conversation; multi-turn: 4.", min=1)
]
Think = Annotated[float, typer.Option(help="Seconds between an answer and the next turn.", min=0)]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--file",
        metavar="FILE",
        help='JSON lines: {"prompt": text or token ids, "output_tokens": 128}.',
        show_default=False,
    ),
]
Goodput = Annotated[
    list[str] | None,
    typer.Option(
        metavar="'ttft:MS tpot:MS e2el:MS'", help="Count the requests that keep to these."
    ),
]
Warmup = Annotated[int, typer.Option(help="Requests before, not counted.", min=0)]
Seed = Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.", min=0)]
NoPrefixCaching = Annotated[
    bool, typer.Option("--no-prefix-caching", help="Compute each prompt whole.")
]
MostSequences = Annotated[
    int | None,
    typer.Option("--max-batch-size", help="Of a model: most sequences in a step.", min=1),
]


def serve(
    engine: EngineOrModel,
    rate: Rate = float("inf"),
    fixed: Fixed = False,
    concurrency: Concurrency = None,
    workload: Workload = "random",
    num_prompts: Requests = 256,
    input_len: InputLength = 1024,
    output_len: OutputLength = 128,
    spread: Spread = 0.0,
    shared: Shared = None,
    prefixes: Prefixes = 1,
    turns: Turns = None,
    think: Think = 0.0,
    file: Prompts = None,
    goodput: Goodput = None,
    warmup: Warmup = 8,
    seed: Seed = 0,
    no_prefix_caching: NoPrefixCaching = False,
    trace: TraceOption = None,
    backend: BackendOption = "auto",
    max_model_len: ContextOption = None,
    max_batch_size: MostSequences = None,
    checkpoint: CheckpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure an engine under a load of requests: latencies, throughput, goodput.

    Exit code 1: a request could not be taken.
    """
    _check(workload, rate, file, fixed)
    check_places({"trace": trace})
    shape = _shape(workload, input_len, output_len, spread, shared, prefixes, turns)
    most = max_batch_size or min(num_prompts, concurrency or MOST_SEQUENCES)
    length = max_model_len or (None if file else _context(shape))
    from ..bench.serving import measure_serving, parse_objectives, warm_up

    objectives = parse_objectives(goodput or ())
    loaded = _opened(engine, backend, max_model_len, length, most, checkpoint)
    talks = _conversations(loaded, shape, file, num_prompts, seed)
    if no_prefix_caching:
        loaded.loop.scheduler.reuses = False
    with progress("bench serve") as advance:
        advance("measuring the machine", 0.0)
        machine = probe(loaded)
        advance("warming up", 0.0)
        warm_up(loaded, talks, warmup)
        with traced(loaded, trace):
            found = measure_serving(
                loaded,
                talks,
                rate=rate,
                fixed=fixed,
                concurrency=concurrency,
                think=think,
                objectives=objectives,
                seed=seed,
                advance=advance,
            )
    warn_if_busy(machine)
    asked = {"workload": workload, "rate": rate, "fixed": fixed, "concurrency": concurrency}
    asked |= {"shape": asdict(shape), "file": file and str(file), "think_seconds": think}
    asked |= {"prefix_caching": loaded.loop.scheduler.reuses, "objectives_seconds": objectives}
    asked |= {"warmup": warmup, "seed": seed}
    if as_json:
        print_json(serving_data(found, machine, asked))
    else:
        print_serving(found, machine, asked)
    if found.failed:
        raise typer.Exit(1)


def _shape(
    workload: str,
    input_len: int,
    output_len: int,
    spread: float,
    shared: float | None,
    prefixes: int,
    turns: int | None,
) -> Shape:
    from ..bench.workloads import Shape

    if shared is None:
        shared = SHARED if workload == "shared-prefix" else 0.0
    if turns is None:
        turns = TURNS if workload == "multi-turn" else 1
    return Shape(input_len, output_len, spread, shared, prefixes, turns)


def _context(shape: Shape) -> int:
    return -(-(shape.longest + 1) // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE


def _opened(
    engine: str,
    backend: str,
    asked: int | None,
    length: int | None,
    most: int,
    checkpoint: Path | None,
) -> CausalLMEngine:
    """The engine; a model is compiled for the lengths and the sequences of the load."""
    return open_causal_lm(
        engine,
        backend=backend,
        max_model_len=asked if is_engine(engine) else length,
        max_batch_size=most,
        checkpoint=checkpoint,
    )


def _conversations(
    engine: CausalLMEngine, shape: Shape, file: Path | None, requests: int, seed: int
) -> list[Conversation]:
    import numpy as np

    from ..bench.workloads import random_conversations, read_conversations

    if file is not None:
        return read_conversations(file, requests, shape.output_tokens, _encoder(engine))
    limit = engine.config.max_model_len
    if shape.longest > limit:
        raise UsageError(
            "options --input-len, --output-len, --spread and --turns",
            expected=f"conversations of at most {limit} tokens, the engine's context",
            found=f"up to {shape.longest} tokens",
            remedy=f"Lower them, or compile with --max-model-len {_context(shape)}.",
        )
    rng = np.random.default_rng((seed, 0))
    return random_conversations(shape, requests, engine.config.vocab_size, rng)


def _encoder(engine: CausalLMEngine) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        if engine.tokenizer is None:
            raise UsageError(
                f"engine {engine.image.name}",
                expected="a tokenizer, for prompts that are text",
                found="none",
                remedy="Write prompts as lists of token ids.",
            )
        return engine.tokenizer.encode(text)

    return encode


def _check(workload: str, rate: float, file: Path | None, fixed: bool) -> None:
    if workload not in WORKLOADS:
        raise UsageError(
            "option --workload",
            expected=f"one of {', '.join(WORKLOADS)}",
            found=repr(workload),
            remedy="Choose one of these.",
        )
    if (workload == "file") != (file is not None):
        raise UsageError(
            "options --workload and --file",
            expected="--workload file with --file FILE, and no file otherwise",
            found=f"--workload {workload}, and {'no file' if file is None else f'--file {file}'}",
            remedy="Add what is missing, or leave out what is too much.",
        )
    if not rate > 0:
        raise UsageError(
            "option --rate",
            expected="requests a second above 0, or inf",
            found=str(rate),
            remedy="Write for example --rate 4.",
        )
    if fixed and rate == float("inf"):
        raise UsageError(
            "option --fixed",
            expected="a --rate, whose distances are to be even",
            found="none: all arrive at once",
            remedy="Add for example --rate 4, or leave --fixed out.",
        )

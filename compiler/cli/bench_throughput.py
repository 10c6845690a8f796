"""``tilewright bench throughput``: decode tokens a second by batch size."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .bench_options import parse_batches, uncompiled, warn_if_busy
from .console import out, print_json, progress
from .options import (
    BackendOption,
    CheckpointOption,
    ContextOption,
    EngineOrModel,
    JsonOption,
    is_engine,
    open_causal_lm,
)

if TYPE_CHECKING:
    from ...runtime.engine import CausalLMEngine
    from ..bench.steady import Steady
    from ..bench.throughput import BatchResult, BatchRival, Throughput


def throughput(
    engine: EngineOrModel,
    batch: Annotated[str, typer.Option(help="Sequences at once; several: 1,8,32.")] = "1,8,32",
    context: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 1024,
    new_tokens: Annotated[int, typer.Option(help="Steps that are timed.", min=1)] = 64,
    compare: Annotated[
        str | None,
        typer.Option(help="torch.compile,eager,vllm or some of them: measured too, in turns."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Model to compare with; by default the one ENGINE was compiled from."),
    ] = None,
    repeat: Annotated[int, typer.Option(help="Measured runs of each.", min=1)] = 3,
    backend: BackendOption = "auto",
    max_model_len: ContextOption = None,
    checkpoint: CheckpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure decode of many sequences: steps in which all of them are running.

    Exit code 1: a contender that failed.
    """
    from ..bench.contenders import parse_names

    names = () if compare is None else parse_names(compare)
    batches = parse_batches(batch)
    loaded = _opened(engine, batches, context, new_tokens, backend, max_model_len, checkpoint)
    from ..bench.throughput import measure_throughput

    model = uncompiled(loaded, engine, reference or checkpoint) if names else None
    with progress("bench throughput") as advance:
        found = measure_throughput(
            loaded,
            model,
            batches=batches,
            compare=names,
            context=context,
            new_tokens=new_tokens,
            repeat=repeat,
            advance=advance,
        )
    warn_if_busy(found.machine)
    if as_json:
        print_json(throughput_data(found))
    else:
        print_throughput(found)
    rivals = [rival for result in found.results for rival in result.rivals]
    if any(rival.error and not rival.is_absent for rival in rivals):
        raise typer.Exit(1)


def _opened(
    engine: str,
    batches: tuple[int, ...],
    context: int,
    new_tokens: int,
    backend: str,
    max_model_len: int | None,
    checkpoint: Path | None,
) -> CausalLMEngine:
    """The engine; a model is compiled for the batch sizes and lengths that are measured."""
    if not is_engine(engine) and max_model_len is None:
        from ..bench.throughput import needed_length

        max_model_len = needed_length(batches, context, new_tokens)
    return open_causal_lm(
        engine,
        backend=backend,
        max_model_len=max_model_len,
        max_batch_size=max(batches),
        checkpoint=checkpoint,
    )


def throughput_data(found: Throughput) -> dict[str, object]:
    """The figures as plain data."""
    plain = asdict(found)
    shared = ("machine", "dtype", "context", "new_tokens", "repeat")
    return {name: plain[name] for name in shared} | {
        "results": [_result_data(result, found.context) for result in found.results]
    }


def _result_data(result: BatchResult, context: int) -> dict[str, object]:
    fastest = result.fastest
    return {
        "batch": result.batch,
        "tokens_per_second": result.tokens_per_second,
        "step_seconds": result.seconds,
        "prefill_seconds": _prefill(result),
        "prefill_tokens_per_second": result.batch * context / _prefill(result),
        "preemptions": result.preemptions,
        "padding_tokens": result.padding_tokens,
        "padding_share": result.padding_share,
        "bytes": result.bytes,
        "floor_seconds": result.floor,
        "share_of_floor": result.share_of_floor,
        "mbu": result.mbu,
        "runs": [_run_data(run) for run in result.ours],
        "contenders": {rival.name: _rival_data(rival) for rival in result.rivals},
        "fastest": None if fastest is None else fastest.name,
        "ratio": None if fastest is None or fastest.ratio is None else asdict(fastest.ratio),
        "bars": {
            bar.name: {"against": bar.against, "bar": bar.value, "ratio": ratio.value, "met": met}
            for bar, ratio, met in result.bars
        },
    }


def _prefill(result: BatchResult) -> float:
    return statistics.median(run.prefill for run in result.ours)


def _run_data(run: Steady) -> dict[str, object]:
    return {**asdict(run), "seconds": run.seconds, "tokens_per_second": run.tokens_per_second}


def _rival_data(rival: BatchRival) -> dict[str, object]:
    return {
        "label": rival.label,
        "error": rival.error,
        "installed": not rival.is_absent,
        "tokens_per_second": _rate(rival.runs),
        "runs": [_run_data(run) for run in rival.runs],
        "ratio": None if rival.ratio is None else asdict(rival.ratio),
    }


def _rate(runs: tuple[Steady, ...]) -> float | None:
    return statistics.median(run.tokens_per_second for run in runs) if runs else None


def print_throughput(found: Throughput) -> None:
    """The figures as a table, on stdout."""
    from .tables import plain_table

    console, machine = out(), found.machine
    title = (
        f"decode, prompts of {found.context} tokens, {found.new_tokens} steps with all sequences "
        f"running, greedy, median of {found.repeat}"
    )
    columns = ("batch", "", "tok/s", "ms a step", "floor", "of floor", "MBU", "prefill", "ratio")
    table = plain_table(columns, title, left=2)
    for result in found.results:
        for row in _rows(result, found.dtype):
            table.add_row(*row)
    console.print(table)
    for line in [line for result in found.results for line in _lines(result)]:
        console.print(line, markup=False)
    console.print(
        f"{machine.target} ({machine.device}): memory reads "
        f"{machine.read_bytes_per_second / 1e9:.0f} GB/s, which gives the floor; MBU is of the "
        "peak rate; ratio: ours over theirs",
        style="dim",
    )


def _rows(result: BatchResult, dtype: str) -> list[tuple[str, ...]]:
    ours = (
        str(result.batch),
        f"tilewright, {dtype}",
        f"{result.tokens_per_second:.1f}",
        f"{result.seconds * 1e3:.3f}",
        f"{result.floor * 1e3:.3f}",
        f"{result.share_of_floor:.2f}",
        f"{result.mbu:.0%}",
        f"{_prefill(result) * 1e3:.0f} ms",
        "",
    )
    return [ours, *(_rival_row(rival) for rival in result.rivals if rival.ratio is not None)]


def _rival_row(rival: BatchRival) -> tuple[str, ...]:
    step = statistics.median(run.seconds for run in rival.runs)
    prefill = statistics.median(run.prefill for run in rival.runs)
    of = rival.ratio
    assert of is not None
    return (
        "",
        rival.label,
        f"{_rate(rival.runs):.1f}",
        f"{step * 1e3:.3f}",
        "",
        "",
        "",
        f"{prefill * 1e3:.0f} ms",
        f"{of.value:.2f}× ({of.low:.2f} to {of.high:.2f})",
    )


def _lines(result: BatchResult) -> list[str]:
    lines = []
    if result.preemptions:
        lines.append(
            f"batch {result.batch}: {result.preemptions} preemptions: the KV memory is too small "
            "for all of them at once, and the figures are not of such steps alone"
        )
    if result.padding_tokens:
        lines.append(
            f"batch {result.batch}: {result.padding_share:.1%} of the tokens computed were padding"
        )
    for rival in result.rivals:
        if rival.is_absent:
            lines.append(f"batch {result.batch}: {rival.name}: {rival.error}")
        elif rival.error is not None:
            lines.append(f"batch {result.batch}: {rival.name} failed: {rival.error}")
    fastest = result.fastest
    if fastest is not None and fastest.ratio is not None:
        ratio = fastest.ratio
        lines.append(
            f"batch {result.batch}: {ratio.value:.2f}× the fastest contender, {fastest.name} "
            f"(95% interval {ratio.low:.2f} to {ratio.high:.2f})"
        )
    for bar, ratio, met in result.bars:
        said = "met" if met else "not met"
        lines.append(
            f"batch {result.batch}: {ratio.value:.2f}× {bar.against}; bar {bar.value:g}×: {said}"
        )
    return lines

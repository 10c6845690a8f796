"""``tilewright bench latency | startup``: figures that everyone measures the same way."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from .console import err, out, print_json, progress
from .options import (
    BackendOption,
    ContextOption,
    EngineOrModel,
    JsonOption,
    is_engine,
    open_causal_lm,
)

if TYPE_CHECKING:
    from ..bench.latency import Latency
    from ..bench.statistics import Ratio

bench_app = typer.Typer(
    help="Measure latency or startup.", no_args_is_help=True, rich_markup_mode="rich"
)


@bench_app.command("latency")
def latency(
    engine: EngineOrModel,
    compare: Annotated[
        str | None,
        typer.Option(help="eager: measure the uncompiled model too, run by run in turn."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Model to compare with; by default the one ENGINE was compiled from."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    repeat: Annotated[int, typer.Option(help="Measured runs of each.")] = 5,
    backend: BackendOption = "auto",
    max_model_len: ContextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill and decode of one request."""
    if compare not in (None, "eager"):
        raise UsageError(
            "option --compare",
            expected="one of eager",
            found=repr(compare),
            remedy="Write --compare eager, or leave it out.",
        )
    loaded = open_causal_lm(engine, backend=backend, max_model_len=max_model_len, max_batch_size=1)
    from ..bench.latency import measure_latency

    checkpoint = None
    if compare == "eager":
        checkpoint = _checkpoint(engine, reference, dict(loaded.report()))

    def uncompiled() -> object:
        from ..bench.reference import ReferenceModel

        assert checkpoint is not None
        return ReferenceModel(checkpoint)

    with progress("bench latency") as advance:
        found = measure_latency(
            loaded,
            uncompiled if checkpoint is not None else None,  # type: ignore[arg-type]
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeat=repeat,
            advance=advance,
        )
    if found.machine.is_busy:
        err().print(
            f"warning: the machine is busy (load {found.machine.load:.1f} on "
            f"{found.machine.cores} cores): figures are rough, repeat when it is idle",
            style="yellow",
        )
    if as_json:
        print_json(latency_data(found))
    else:
        _print_latency(found)


def _checkpoint(engine: str, reference: str | None, report: dict[str, object]) -> str:
    """Where the uncompiled model is."""
    model = report.get("model")
    named = model.get("name") if isinstance(model, dict) else None
    path = reference or (str(named) if is_engine(engine) else engine)
    if not Path(path).exists():
        raise UsageError(
            "option --reference",
            expected="the model that the engine was compiled from",
            found=f"nothing at {path}",
            remedy="Name it: --reference MODEL.",
        )
    return path


def latency_data(found: Latency) -> dict[str, object]:
    """The figures as plain data."""
    from dataclasses import asdict

    from ..bench.latency import DECODE_BAR, PREFILL_BAR

    data = asdict(found)
    for key in ("ours", "eager"):
        if data[key] is not None:
            for phase in ("prefill", "decode"):
                data[key][f"{phase}_tokens_per_second"] = statistics.median(data[key][phase])
    data["mbu"] = found.mbu
    if found.decode_ratio is not None and found.prefill_ratio is not None:
        data["bars"] = {
            "decode": {"bar": DECODE_BAR, "met": found.decode_ratio.value >= DECODE_BAR},
            "prefill": {"bar": PREFILL_BAR, "met": found.prefill_ratio.value >= PREFILL_BAR},
        }
    return data


def _print_latency(found: Latency) -> None:
    from ..bench.latency import DECODE_BAR, PREFILL_BAR
    from .tables import plain_table

    machine = found.machine
    title = (
        f"{found.prompt_tokens} prompt tokens, {found.new_tokens} new tokens, batch 1, "
        f"greedy, median of {found.repeat}"
    )
    columns = ("", "TTFT", "prefill", "ITL", "decode")
    table = plain_table(columns, title)
    for series in (found.ours, found.eager):
        if series is not None:
            table.add_row(
                series.name if series.name != "eager" else "Hugging Face eager, float32",
                f"{series.ttft * 1e3:.0f} ms",
                f"{statistics.median(series.prefill):.0f} tok/s",
                f"{series.itl * 1e3:.2f} ms",
                f"{statistics.median(series.decode):.1f} tok/s",
            )
    if found.floor_decode is not None and found.floor_prefill is not None:
        table.add_row(
            "onnxruntime, the matmuls alone",
            f"{found.prompt_tokens / found.floor_prefill * 1e3:.0f} ms",
            f"{found.floor_prefill:.0f} tok/s",
            f"{1e3 / found.floor_decode:.2f} ms",
            f"{found.floor_decode:.1f} tok/s",
            style="dim",
        )
    console = out()
    console.print(table)
    console.print()
    if found.decode_ratio is not None and found.prefill_ratio is not None:
        console.print(_ratio_line("decode", found.decode_ratio, DECODE_BAR))
        console.print(_ratio_line("prefill", found.prefill_ratio, PREFILL_BAR))
        console.print(f"tokens equal to eager's: {found.agreeing_tokens} of {found.new_tokens}")
    console.print(
        f"MBU {found.mbu:.0%}: {found.bytes_per_token / 1e6:.0f} MB a token, "
        f"memory reads {machine.read_bytes_per_second / 1e9:.1f} GB/s"
    )
    console.print(
        f"{machine.target}, {machine.threads} threads of {machine.cores} cores, "
        f"load {machine.load:.1f}",
        style="dim",
    )


def _ratio_line(name: str, ratio: Ratio, bar: float) -> str:
    met = "met" if ratio.value >= bar else "not met"
    return (
        f"{name} {ratio.value:.2f}× eager (95% interval {ratio.low:.2f} to {ratio.high:.2f}); "
        f"bar {bar:g}×: {met}"
    )


@bench_app.command("startup")
def startup(
    engine: EngineOrModel,
    repeat: Annotated[int, typer.Option(help="Processes to start.", min=1)] = 3,
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure import, load (or compile) and first token in fresh processes."""
    from ..bench.startup import measure_startup

    _check_exists(engine)
    with progress("bench startup") as advance:
        found = measure_startup(engine, backend, repeat, advance)
    medians = found.medians()
    if as_json:
        from dataclasses import asdict

        print_json({"runs": asdict(found), "median": medians, "repeat": repeat})
        return
    from .tables import plain_table

    ready = "load engine" if is_engine(engine) else "compile and start"
    table = plain_table(("phase", "median", "runs"), f"{repeat} fresh processes")
    rows = zip(
        ("import", ready, "first token", "whole process"),
        (found.imports, found.ready, found.first_token, found.process),
        medians.values(),
        strict=True,
    )
    for name, runs, median in rows:
        table.add_row(name, f"{median:.2f} s", " ".join(f"{one:.2f}" for one in runs))
    out().print(table)


def _check_exists(path: str) -> None:
    if not Path(path).exists():
        raise UsageError(
            path,
            expected="an engine folder, a model folder or a .gguf file",
            found="nothing there",
            remedy="Check the path.",
        )

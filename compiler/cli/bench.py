"""``tilewright bench …``: figures that everyone measures the same way."""

from __future__ import annotations

from typing import Annotated

import typer

from .bench_kernels import kernels
from .bench_options import uncompiled, warn_if_busy
from .bench_serve import serve
from .bench_throughput import throughput
from .console import out, print_json, progress
from .options import (
    BackendOption,
    CheckpointOption,
    ContextOption,
    EngineOrModel,
    JsonOption,
    check_model,
    is_engine,
    open_causal_lm,
)

bench_app = typer.Typer(
    help="Measure latency, throughput, serving, kernels or startup.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
bench_app.command("kernels")(kernels)
bench_app.command("throughput")(throughput)
bench_app.command("serve")(serve)


@bench_app.command("latency")
def latency(
    engine: EngineOrModel,
    compare: Annotated[
        str | None,
        typer.Option(help="torch.compile,eager,vllm or some of them: measured too, in turns."),
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
    checkpoint: CheckpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill and decode of one request."""
    from ..bench.contenders import parse_names

    names = () if compare is None else parse_names(compare)
    loaded = open_causal_lm(
        engine,
        backend=backend,
        max_model_len=max_model_len,
        max_batch_size=1,
        checkpoint=checkpoint,
    )
    from ..bench.latency import measure_latency
    from .bench_view import latency_data, print_latency

    model = uncompiled(loaded, engine, reference or checkpoint) if names else None
    with progress("bench latency") as advance:
        found = measure_latency(
            loaded,
            model,
            compare=names,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeat=repeat,
            advance=advance,
        )
    warn_if_busy(found.machine)
    if as_json:
        print_json(latency_data(found))
    else:
        print_latency(found)
    if any(rival.error and not rival.is_absent for rival in found.rivals):
        raise typer.Exit(1)


@bench_app.command("startup")
def startup(
    engine: EngineOrModel,
    repeat: Annotated[int, typer.Option(help="Processes to start.", min=1)] = 3,
    backend: BackendOption = "auto",
    checkpoint: CheckpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure import, load (or compile) and first token in fresh processes."""
    from ..bench.startup import measure_startup

    engine = check_model(engine).path
    with progress("bench startup") as advance:
        found = measure_startup(engine, backend, repeat, advance, checkpoint)
    medians = found.medians()
    if as_json:
        from dataclasses import asdict

        print_json({"runs": asdict(found), "median": medians, "repeat": repeat})
        return
    from .tables import plain_table

    ready = "load engine" if is_engine(engine) else "compile and start"
    table = plain_table(("phase", "median", "runs"), f"{repeat} fresh processes")
    rows = zip(
        (
            "import",
            ready,
            "  of that, weights to the device",
            "first token",
            "whole process",
            "  without the weights",
        ),
        (
            found.imports,
            found.ready,
            found.weights,
            found.first_token,
            found.process,
            found.beyond_weights,
        ),
        medians.values(),
        strict=True,
    )
    for name, runs, median in rows:
        table.add_row(name, f"{median:.2f} s", " ".join(f"{one:.2f}" for one in runs))
    out().print(table)

"""``tilewright bench kernels``: the kernels of a step, one by one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, cast

import typer

from .bench_options import parse_batches, parse_only, warn_if_busy
from .console import out, print_json, progress
from .options import (
    BackendOption,
    CheckpointOption,
    ContextOption,
    EngineOrModel,
    JsonOption,
    open_causal_lm,
)

if TYPE_CHECKING:
    from ..bench.kernels import KernelBench, KernelRow, KernelStep
    from ..bench.step_calls import Phase

COMPUTES = 0.5  # of the floor: a kernel that spends it computing is shown by its TFLOP/s


def kernels(
    engine: EngineOrModel,
    compare: Annotated[
        str | None,
        typer.Option(help="torch.compile,eager,library or some of them: timed too, in turns."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences of a step; several: 1,8,32.")] = "1",
    context: Annotated[int, typer.Option(help="Tokens of each sequence.", min=1)] = 512,
    phase: Annotated[str, typer.Option(help="decode, or prefill of whole prompts.")] = "decode",
    only: Annotated[
        str | None, typer.Option(help="Names of kernels or ops: linear,paged_attention.")
    ] = None,
    backend: BackendOption = "auto",
    max_model_len: ContextOption = None,
    checkpoint: CheckpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time each kernel of a step on cold operands, beside the roofline and other implementations.

    A GPU is needed. Exit code 1: a kernel whose results differ from another implementation's.
    """
    from ..bench.contenders import parse_names
    from ..bench.kernel_rivals import NAMES

    names = () if compare is None else parse_names(compare, NAMES)
    batches = parse_batches(batch)
    loaded = open_causal_lm(
        engine,
        backend=backend,
        max_model_len=max_model_len,
        max_batch_size=max(batches),
        checkpoint=checkpoint,
    )
    from ..bench.kernels import measure_kernels

    with progress("bench kernels") as advance:
        found = measure_kernels(
            loaded,
            phase=cast("Phase", phase),
            batches=batches,
            context=context,
            compare=names,
            only=parse_only(only),
            advance=advance,
        )
    warn_if_busy(found.machine)
    if as_json:
        print_json(kernels_data(found))
    else:
        print_kernels(found)
    if any(row.is_wrong for step in found.steps for row in step.rows):
        raise typer.Exit(1)


def kernels_data(found: KernelBench) -> dict[str, object]:
    """The figures as plain data."""
    return {
        "machine": asdict(found.machine),
        "phase": found.phase,
        "context": found.context,
        "rounds": found.rounds,
        "steps": [_step_data(step) for step in found.steps],
    }


def _step_data(step: KernelStep) -> dict[str, object]:
    return {
        "batch": step.batch,
        "calls": step.calls,
        "seconds": step.seconds,
        "floor_seconds": step.floor,
        "share_of_floor": step.floor / step.seconds if step.rows else None,
        "bytes": step.bytes,
        "kernels": [_row_data(row) for row in step.rows],
    }


def _row_data(row: KernelRow) -> dict[str, object]:
    best = row.best
    return {
        **asdict(row),
        "bytes_per_second": row.bytes_per_second,
        "flops_per_second": row.flops_per_second,
        "share_of_floor": row.share_of_floor,
        "is_wrong": row.is_wrong,
        "best": None if best is None else best.name,
        "ratio": None if best is None or best.ratio is None else asdict(best.ratio),
    }


def print_kernels(found: KernelBench) -> None:
    """The figures as tables, on stdout."""
    console, machine = out(), found.machine
    for step in found.steps:
        console.print(_table(found, step), markup=False)  # names of kernels may hold brackets
        for line in _lines(step):
            console.print(line, markup=False)
        console.print()
    rates = [f"reads {machine.read_bytes_per_second / 1e9:.0f} GB/s"]
    if machine.copy_bytes_per_second is not None:
        rates.append(f"copies {machine.copy_bytes_per_second / 1e9:.0f} GB/s")
    if machine.matmul_flops_per_second is not None:
        rates.append(f"bfloat16 matmul {machine.matmul_flops_per_second / 1e12:.0f} TFLOP/s")
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    console.print(f"{machine.device}: {', '.join(rates)}; {versions}", style="dim")


def _table(found: KernelBench, step: KernelStep) -> object:
    from .tables import plain_table

    title = (
        f"{found.phase}, batch {step.batch}, context {found.context}: cold operands, "
        f"median of {found.rounds}"
    )
    columns = ("kernel", "a step", "µs each", "µs a step", "rate", "of floor", "best rival", "")
    table = plain_table(columns, title)
    for row in step.rows:
        table.add_row(*_cells(row, found))
    return table


def _cells(row: KernelRow, found: KernelBench) -> tuple[str, ...]:
    rate = f"{row.bytes_per_second / 1e9:.0f} GB/s"
    computing = row.flops / (found.machine.matmul_flops_per_second or float("inf"))
    if computing > COMPUTES * row.floor > 0:
        rate = f"{row.flops_per_second / 1e12:.1f} TFLOP/s"
    best = row.best
    ratio = "–"
    if best is not None and best.ratio is not None:
        of = best.ratio
        ratio = f"{of.value:.2f}× ({of.low:.2f} to {of.high:.2f})"
    return (
        row.name + (" WRONG" if row.is_wrong else ""),
        str(row.count),
        f"{row.seconds * 1e6:.2f}",
        f"{row.count * row.seconds * 1e6:.0f}",
        rate,
        f"{row.share_of_floor:.2f}",
        ratio,
        "" if best is None else best.label,
    )


def _lines(step: KernelStep) -> list[str]:
    if not step.rows:
        return ["no kernel of that name computes anything in this step"]
    lines = [
        f"all {step.calls} calls: {step.seconds * 1e6:.0f} µs, floor {step.floor * 1e6:.0f} µs "
        f"({step.floor / step.seconds:.2f} of it), {step.bytes / 1e6:.1f} MB; "
        "ratio: the rival's time over ours"
    ]
    for row in step.rows:
        if row.is_wrong:
            lines.append(f"{row.name}: its results differ by {row.error:.2g} of the largest")
        lines += [
            f"{row.name}: no {rival.name}: {rival.error}" for rival in row.rivals if rival.error
        ]
    return lines

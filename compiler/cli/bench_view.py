"""How ``bench latency`` shows its figures: as plain data, and as tables."""

from __future__ import annotations

import re
import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..bench.entrants import Series
from ..bench.latency import Bar, Latency, Rival
from ..bench.statistics import Ratio
from ..bench.trace import Kernel, Trace
from .console import out
from .tables import plain_table

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_KERNELS = 12
NAME_WIDTH = 72


def latency_data(found: Latency) -> dict[str, object]:
    """The figures as plain data."""
    shared = ("machine", "dtype", "prompt_tokens", "new_tokens", "repeat", "random_weights")
    floors = ("floor_decode", "floor_prefill", "bytes_per_token", "mbu")
    plain = asdict(found)
    data: dict[str, object] = {name: plain[name] for name in shared}
    data["ours"] = _series_data(found.ours)
    data["contenders"] = {rival.name: _rival_data(rival) for rival in found.rivals}
    data |= {name: getattr(found, name) for name in floors}
    data["bars"] = {
        bar.phase: {"against": bar.against, "bar": bar.value, "ratio": ratio.value, "met": met}
        for bar, ratio, met in found.bars()
    }
    data["trace"] = _trace_data(found.trace, found.ours) if isinstance(found.trace, Trace) else None
    data["trace_note"] = found.trace if isinstance(found.trace, str) else None
    return data


def _series_data(series: Series) -> dict[str, object]:
    rates = {
        f"{phase}_tokens_per_second": statistics.median(getattr(series, phase))
        for phase in ("prefill", "decode")
    }
    return {**asdict(series), **rates}


def _rival_data(rival: Rival) -> dict[str, object]:
    return {
        "label": rival.label,
        "error": rival.error,
        "first_steps_seconds": list(rival.first_steps),
        "series": None if rival.series is None else _series_data(rival.series),
        "decode_ratio": None if rival.decode is None else asdict(rival.decode),
        "prefill_ratio": None if rival.prefill is None else asdict(rival.prefill),
        "agreeing_tokens": rival.agreeing_tokens,
    }


def _trace_data(trace: Trace, ours: Series) -> dict[str, object]:
    rates = [kernel.bytes_per_second for kernel in trace.kernels]
    kernels = [
        {**asdict(kernel), "bytes_per_second": rate}
        for kernel, rate in zip(trace.kernels, rates, strict=True)
    ]
    return {
        **asdict(trace),
        "kernels": kernels,
        "launches_per_layer": trace.launches_per_layer,
        "itl_not_busy": ours.itl - trace.busy,
    }


def print_latency(found: Latency) -> None:
    """The figures as tables, on stdout."""
    console = out()
    console.print(_contenders(found))
    console.print()
    for rival in found.rivals:
        for line in _rival_lines(rival, found):
            console.print(line)
    machine = found.machine
    rate = f"memory reads {machine.read_bytes_per_second / 1e9:.1f} GB/s"
    if machine.copy_bytes_per_second is not None and machine.matmul_flops_per_second is not None:
        rate += (
            f", copies {machine.copy_bytes_per_second / 1e9:.1f} GB/s, "
            f"bfloat16 matmul {machine.matmul_flops_per_second / 1e12:.0f} TFLOP/s"
        )
    console.print(f"MBU {found.mbu:.0%}: {found.bytes_per_token / 1e6:.0f} MB a token, {rate}")
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    console.print(
        f"{machine.target} ({machine.device}), {machine.threads} threads of {machine.cores} cores, "
        f"load {machine.load:.1f}; {versions}",
        style="dim",
    )
    if isinstance(found.trace, Trace):
        _print_trace(found.trace, found.ours)
    elif found.trace is not None:
        console.print(f"kernels of a decode step: {found.trace}", style="yellow", markup=False)


def _contenders(found: Latency) -> Table:
    title = (
        f"{found.prompt_tokens} prompt tokens, {found.new_tokens} new tokens, batch 1, "
        f"greedy, median of {found.repeat}"
    )
    table = plain_table(("", "TTFT", "prefill", "ITL", "decode"), title)
    rows = [(f"tilewright, {found.dtype}", found.ours)]
    rows += [(rival.label, rival.series) for rival in found.rivals if rival.series is not None]
    for label, series in rows:
        prefill, decode = (statistics.median(rates) for rates in (series.prefill, series.decode))
        table.add_row(label, *_times(series.ttft, prefill, series.itl, decode))
    if found.floor_decode is not None and found.floor_prefill is not None:
        ttft, itl = found.prompt_tokens / found.floor_prefill, 1 / found.floor_decode
        on_cpu = found.machine.device == "cpu"
        label = "onnxruntime, the matmuls alone" if on_cpu else "floor: what must be read, matmuls"
        row = _times(ttft, found.floor_prefill, itl, found.floor_decode)
        table.add_row(label, *row, style="dim")
    return table


def _times(ttft: float, prefill: float, itl: float, decode: float) -> tuple[str, ...]:
    return (
        f"{ttft * 1e3:.{0 if ttft >= 0.1 else 1}f} ms",
        f"{prefill:.0f} tok/s",
        f"{itl * 1e3:.2f} ms",
        f"{decode:.1f} tok/s",
    )


def _rival_lines(rival: Rival, found: Latency) -> list[str]:
    if rival.decode is None or rival.prefill is None:
        return [f"{rival.name} failed: {rival.error}".replace("[", r"\[")]
    bars = {bar.phase: (bar, met) for bar, _, met in found.bars() if bar.against == rival.name}
    lines = [
        _ratio_line(phase, rival.name, ratio, bars.get(phase))
        for phase, ratio in (("decode", rival.decode), ("prefill", rival.prefill))
    ]
    if rival.agreeing_tokens is not None:
        lines.append(
            f"tokens equal to {rival.name}'s: {rival.agreeing_tokens} of {found.new_tokens}"
        )
    elif found.random_weights:
        lines.append(f"tokens not compared with {rival.name}'s: random weights of its own")
    if rival.first_steps:
        seconds = ", ".join(f"{step:.1f}" for step in rival.first_steps)
        lines.append(f"first steps of {rival.name}, not counted: {seconds} s")
    return lines


def _ratio_line(phase: str, name: str, ratio: Ratio, bar: tuple[Bar, bool] | None) -> str:
    line = f"{phase} {ratio.value:.2f}× {name} (95% interval {ratio.low:.2f} to {ratio.high:.2f})"
    if bar is None:
        return line
    wanted, met = bar
    if wanted.against == "torch.compile":
        return f"{line}; faster: {'yes' if met else 'no'}"
    return f"{line}; bar {wanted.value:g}×: {'met' if met else 'not met'}"


def _print_trace(trace: Trace, ours: Series) -> None:
    console = out()
    console.print()
    console.print(
        f"a decode step on the device (median of {trace.steps}, under the profiler): "
        f"{trace.launches:g} kernels, {trace.launches_per_layer:.1f} a layer of {trace.layers}; "
        f"{trace.memory_operations:g} copies and fills"
    )
    between = "" if trace.between is None else f", {trace.between * 1e6:.0f} µs to the next step"
    console.print(
        f"busy {trace.busy * 1e3:.3f} ms of {trace.span * 1e3:.3f}, idle between kernels "
        f"{trace.idle * 1e6:.0f} µs{between}; without the profiler a token takes "
        f"{ours.itl * 1e3:.3f} ms, {(ours.itl - trace.busy) * 1e3:.3f} more than busy"
    )
    columns = ("kernel", "a step", "µs each", "ms a step", "of busy", "MB each", "GB/s")
    table = plain_table(columns)
    for kernel in trace.kernels[:SHOWN_KERNELS]:
        table.add_row(*_kernel_row(kernel, trace.busy))
    console.print(table, markup=False)  # names of kernels hold brackets
    hidden = trace.kernels[SHOWN_KERNELS:]
    if hidden:
        rest = sum(kernel.seconds for kernel in hidden)
        console.print(f"and {len(hidden)} more, {rest * 1e3:.3f} ms a step (--json has them all)")


def _kernel_row(kernel: Kernel, busy: float) -> tuple[str, ...]:
    rate = kernel.bytes_per_second
    return (
        short_name(kernel.name),
        f"{kernel.launches:g}",
        f"{kernel.seconds / kernel.launches * 1e6:.1f}",
        f"{kernel.seconds * 1e3:.3f}",
        f"{kernel.seconds / busy:.0%}",
        "" if kernel.bytes is None else f"{kernel.bytes / 1e6:.2f}",
        "" if rate is None else f"{rate / 1e9:.0f}",
    )


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces of ATen and arguments, cut to the table."""
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::|at::cuda::", "", name)
    name = name.partition("(")[0] or name
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…"

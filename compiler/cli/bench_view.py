"""How ``bench latency`` shows its figures: as plain data, and as tables."""

from __future__ import annotations

import re
import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..bench.bars import FLOOR, Bar
from ..bench.entrants import Series
from ..bench.latency import Latency, Rival
from ..bench.statistics import Ratio
from ..bench.trace import Kernel, Trace
from .console import out
from .tables import plain_table

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_KERNELS = 12
NAME_WIDTH = 64


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
        bar.name: {"against": bar.against, "bar": bar.value, "ratio": ratio.value, "met": met}
        for bar, ratio, met in found.bars()
    }
    data["fastest"] = None if found.fastest is None else found.fastest.name
    data["trace"] = _trace_data(found.trace, found) if isinstance(found.trace, Trace) else None
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
        "installed": not rival.is_absent,
        "first_steps_seconds": list(rival.first_steps),
        "series": None if rival.series is None else _series_data(rival.series),
        "decode_ratio": None if rival.decode is None else asdict(rival.decode),
        "prefill_ratio": None if rival.prefill is None else asdict(rival.prefill),
        "agreeing_tokens": rival.agreeing_tokens,
    }


def _trace_data(trace: Trace, found: Latency) -> dict[str, object]:
    kernels = [
        {
            **asdict(kernel),
            "bytes_per_second": kernel.bytes_per_second,
            "share_of_step": kernel.seconds / trace.busy,
            "share_of_floor": _of_floor(kernel, found),
        }
        for kernel in trace.kernels
    ]
    return {
        **asdict(trace),
        "kernels": kernels,
        "launches_per_layer": trace.launches_per_layer,
        "itl_not_busy": found.ours.itl - trace.busy,
    }


def _of_floor(kernel: Kernel, found: Latency) -> float | None:
    """The share of the rate at which the machine reads."""
    rate = kernel.bytes_per_second
    return None if rate is None else rate / found.machine.read_bytes_per_second


def print_latency(found: Latency) -> None:
    """The figures as tables, on stdout."""
    console = out()
    console.print(_contenders(found))
    console.print()
    for rival in found.rivals:
        for line in _rival_lines(rival, found):
            console.print(line)
    for line in _summary_lines(found):
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
        _print_trace(found.trace, found)
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


def _summary_lines(found: Latency) -> list[str]:
    """What is of no single contender: the fastest of them, and the floor."""
    ran = [rival for rival in found.rivals if rival.decode is not None]
    lines = [
        _ratio_line(bar.phase, "the floor", ratio, (bar, met))
        for bar, ratio, met in found.bars()
        if bar.against == FLOOR
    ]
    if found.fastest is not None and len(ran) > 1:
        lines.append(f"the fastest contender at decode: {found.fastest.name}")
    return lines


def _rival_lines(rival: Rival, found: Latency) -> list[str]:
    if rival.is_absent:
        return [f"{rival.name}: {rival.error}"]
    if rival.decode is None or rival.prefill is None:
        return [f"{rival.name} failed: {rival.error}".replace("[", r"\[")]
    own = [(bar, met) for bar, _, met in found.bars() if bar.against == rival.name]
    bars = {bar.phase: (bar, met) for bar, met in own}
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
    if wanted.value == 1.0:
        return f"{line}; faster: {'yes' if met else 'no'}"
    return f"{line}; bar {wanted.value:g}×: {'met' if met else 'not met'}"


def _print_trace(trace: Trace, found: Latency) -> None:
    console, ours = out(), found.ours
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
    columns = ("kernel", "a step", "µs each", "ms a step", "of busy", "MB each", "GB/s", "of read")
    table = plain_table(columns)
    for kernel in trace.kernels[:SHOWN_KERNELS]:
        table.add_row(*_kernel_row(kernel, trace.busy, found))
    console.print(table, markup=False)  # names of kernels hold brackets
    hidden = trace.kernels[SHOWN_KERNELS:]
    if hidden:
        rest = sum(kernel.seconds for kernel in hidden)
        console.print(f"and {len(hidden)} more, {rest * 1e3:.3f} ms a step (--json has them all)")


def _kernel_row(kernel: Kernel, busy: float, found: Latency) -> tuple[str, ...]:
    rate, share = kernel.bytes_per_second, _of_floor(kernel, found)
    return (
        short_name(kernel.name),
        f"{kernel.launches:g}",
        f"{kernel.seconds / kernel.launches * 1e6:.1f}",
        f"{kernel.seconds * 1e3:.3f}",
        f"{kernel.seconds / busy:.0%}",
        "" if kernel.bytes is None else f"{kernel.bytes / 1e6:.2f}",
        "" if rate is None else f"{rate / 1e9:.0f}",
        "" if share is None else f"{share:.2f}",
    )


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces of ATen and arguments, cut to the table."""
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::|at::cuda::", "", name)
    name = name.partition("(")[0] or name
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…"

"""``tilewright targets``: the devices that are known, and this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import out, print_json
from .options import JsonOption

if TYPE_CHECKING:
    from ...targets import Target


COLUMNS = ("target", "arch", "kernels", "SMs/cores", "L2", "DRAM", "GB/s")
RATES = ("float32", "bfloat16", "float8_e4m3fn")


def targets(as_json: JsonOption = False) -> None:
    """List the devices that Tilewright knows, and this machine's."""
    from ...targets import TARGETS, Target, cpu_isa_flags, gpu_problem

    here = Target.detect()
    if as_json:
        rows = [_as_data(target, here) for target in TARGETS.values()]
        found = {"detected": str(here), "isa": list(cpu_isa_flags()), "gpu_problem": gpu_problem()}
        print_json({**found, "triton": _triton(), "targets": rows})
        return
    from .tables import plain_table

    table = plain_table((*COLUMNS, "float32", "bfloat16", "fp8"), left=3)
    for target in TARGETS.values():
        table.add_row(*_row(target, here))
    console = out()
    console.print(table)
    console.print(
        "Rates are dense peaks in TFLOP/s, for the CPU those of one core. Kernels: whether Triton "
        "kernels are compiled for it, on any machine.",
        style="dim",
    )
    for line in _here_lines(here):
        console.print(line, markup=False)


def _row(target: Target, here: Target) -> tuple[str, ...]:
    rates = dict(target.tflops)
    return (
        f"{target.name} (this machine)" if target.name == here.name else target.name,
        target.sm,
        "yes" if _has_kernels(target) else "–",
        str(target.sms),
        f"{target.l2_bytes >> 20} MiB",
        f"{target.dram_bytes >> 30} GiB" if target.dram_bytes else "–",
        f"{target.dram_gb_per_s:.0f}",
        *(f"{rates[dtype]:.1f}" if dtype in rates else "–" for dtype in RATES),
    )


def _here_lines(here: Target) -> list[str]:
    """This machine, why it has no GPU, and what compiles for which target here."""
    from ...targets import cpu_isa_flags, gpu_problem

    isa = f" with {', '.join(cpu_isa_flags())}" if here.is_cpu and cpu_isa_flags() else ""
    problem, triton = gpu_problem(), _triton()
    lines = [f"This machine: {here}{isa}."]
    if problem is not None:
        lines.append(f"No GPU: {problem}.")
    compiler = "not installed: kernels cannot be compiled here" if triton is None else triton
    lines.append(f"Triton: {compiler}.")
    lines.append("Backends: onnxruntime for the cpu, triton for GPUs, eager for all.")
    return lines


def _triton() -> str | None:
    """The installed Triton's version."""
    from ...codegen.triton.aot import triton_version
    from ...errors import UnsupportedError

    try:
        return triton_version()
    except UnsupportedError:
        return None


def _has_kernels(target: Target) -> bool:
    from ...codegen.triton.aot import ARCHS

    return target.arch in ARCHS


def _as_data(target: Target, here: Target) -> dict[str, object]:
    from dataclasses import asdict

    facts = {**asdict(target), "tflops": dict(target.tflops)}
    return {**facts, "kernels": _has_kernels(target), "here": target.name == here.name}

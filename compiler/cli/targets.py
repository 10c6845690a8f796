"""``tilewright targets``: the devices that are known, and this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import out, print_json
from .options import JsonOption

if TYPE_CHECKING:
    from ...targets import Target


def targets(as_json: JsonOption = False) -> None:
    """List the devices that Tilewright knows, and this machine's."""
    from ...targets import TARGETS, Target, cpu_isa_flags

    here = Target.detect()
    if as_json:
        rows = [_as_data(target) for target in TARGETS.values()]
        print_json({"detected": str(here), "isa": list(cpu_isa_flags()), "targets": rows})
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("target", "arch", "SMs/cores", "L2", "DRAM", "GB/s", "float32", "bfloat16", "fp8"):
        table.add_column(name, justify="left" if name in ("target", "arch") else "right")
    for target in TARGETS.values():
        rates = dict(target.tflops)
        table.add_row(
            target.name,
            target.sm,
            str(target.sms),
            f"{target.l2_bytes >> 20} MiB",
            f"{target.dram_bytes >> 30} GiB" if target.dram_bytes else "–",
            f"{target.dram_gb_per_s:.0f}",
            *(
                f"{rates[dtype]:.1f}" if dtype in rates else "–"
                for dtype in ("float32", "bfloat16", "float8_e4m3fn")
            ),
        )
    console = out()
    console.print(table)
    console.print("Rates are dense peaks in TFLOP/s, for the CPU those of one core.", style="dim")
    isa = f" with {', '.join(cpu_isa_flags())}" if here.is_cpu and cpu_isa_flags() else ""
    console.print(f"This machine: {here}{isa}. Backends: onnxruntime for the cpu, eager for all.")


def _as_data(target: Target) -> dict[str, object]:
    from dataclasses import asdict

    return {**asdict(target), "tflops": dict(target.tflops)}

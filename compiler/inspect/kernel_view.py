"""Kernels for the reader: a table, one kernel's facts, and the same as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ...codegen.triton.occupancy import occupancy
from ...codegen.triton.package import Binary, KernelPackage, launch_key
from ...codegen.triton.source import Launch
from ...runtime.image import EngineImage
from ...targets import Target
from .facts import Setting, duration, number, size
from .kernels import KernelFacts, KernelReport, Step

RESOURCES = ("registers", "spills", "shared", "threads", "blocks/SM", "occupancy")
COSTS = ("FLOP", "bytes", "roofline")
FOOTNOTE = "A call of a library or of torch counts as one launch. Sources: --kernel NAME."


def has_kernels(image: EngineImage) -> bool:
    """Whether any call of the engine is Triton's, so that there is more to say than its name."""
    calls = (*image.program.calls, *image.decoding.program.calls)
    return any(call.loader == "triton" for call in calls)


def kernel_columns(settings: Sequence[Setting]) -> tuple[str, ...]:
    """Heads of `kernel_rows`: two of text, then launches at each setting and other figures."""
    return ("kernel", "kind", *(setting.name for setting in settings), *RESOURCES, *COSTS)


def kernel_rows(
    report: KernelReport, target: Target, settings: Sequence[Setting]
) -> list[tuple[str, ...]]:
    """One row a kernel. Resources are those of the binaries that run at the first setting, one
    behind the other where there are several, and none where none does; costs are those there.
    """
    first = settings[0].name
    rows = []
    for kernel in report.kernels:
        launches = (str(kernel.steps[setting.name].launches) for setting in settings)
        running = _running(kernel, first) if kernel.steps[first].launches else []
        columns = zip(*(_resources(b, target) for b in running), strict=True)
        resources = [" / ".join(dict.fromkeys(column)) for column in columns]
        costs = _costs(kernel.steps[first])
        rows.append(
            (kernel.name, kernel.kind, *launches, *(resources or ["–"] * len(RESOURCES)), *costs)
        )
    return rows


def sum_lines(report: KernelReport, settings: Sequence[Setting]) -> list[str]:
    """What all calls come to, a line a setting."""
    lines = []
    for setting in settings:
        whole, layer = report.whole[setting.name], report.a_layer.get(setting.name)
        a_layer = (
            ""
            if layer is None
            else f", {layer:.4g} a layer ({_count(report.layers, 'layer', 'layers')})"
        )
        lines.append(
            f"{setting.name}: {_step_text(whole)}{a_layer}; {number(whole.flops)} FLOP, "
            f"{size(whole.bytes)}, at least {duration(whole.seconds)}"
        )
    return lines


def kernel_lines(
    kernel: KernelFacts, target: Target, settings: Sequence[Setting]
) -> list[tuple[str, str]]:
    """Everything about one kernel but its source, labelled."""
    lines = [
        ("kernel", kernel.name),
        ("kind", kernel.kind),
        ("computes", origin_text(kernel.origin)),
        ("calls", str(kernel.calls)),
    ]
    for setting in settings:
        step = kernel.steps[setting.name]
        flops, moved, seconds = _costs(step)
        costs = f"{flops} FLOP, {moved}, at least {seconds}"
        lines.append((setting.name, f"{_step_text(step)}, {costs}"))
    if kernel.package is not None:
        for launch in _launches(kernel.package):
            lines.append((f"launch {launch.function}", _launch_text(launch)))
            binary = kernel.package.binaries.get(launch_key(launch))
            if binary is not None:
                lines.append((f"on {target}", _resources_text(binary, target)))
    return lines


def kernel_data(kernel: KernelFacts, target: Target) -> dict[str, object]:
    """The same as plain data, the source with it."""
    package = kernel.package
    return {
        "kernel": kernel.name,
        "kind": kernel.kind,
        "ops": origin_text(kernel.origin),
        "calls": kernel.calls,
        "launches": {setting: step.launches for setting, step in kernel.steps.items()},
        "costs": {
            setting: {"flops": s.flops, "bytes": s.bytes, "roofline_seconds": s.seconds}
            for setting, s in kernel.steps.items()
        },
        "binaries": [] if package is None else _binaries_data(kernel, package, target),
        "source": None if package is None else package.source.text,
    }


def sums_data(report: KernelReport) -> dict[str, object]:
    """The sums as plain data, by setting."""
    return {
        setting: {
            "launches": step.launches,
            "launches_a_layer": report.a_layer.get(setting),
            "layers": report.layers,
            "flops": step.flops,
            "bytes": step.bytes,
            "roofline_seconds": step.seconds,
        }
        for setting, step in report.whole.items()
    }


def origin_text(ops: Sequence[str]) -> str:
    """The ops that a call computes, in words."""
    if len(ops) <= 1:
        return "".join(ops)
    return ", ".join(f"{n} {op}" if n > 1 else op for op, n in Counter(ops).most_common())


def _launches(package: KernelPackage) -> list[Launch]:
    """Each launch of the source once, in order."""
    every = [launch for variant in package.source.variants for launch in variant.launches]
    return list({launch_key(launch): launch for launch in every}.values())


def _running(kernel: KernelFacts, setting: str) -> list[Binary]:
    """The binaries that run at a setting, all where none does; () for a library's kernel."""
    if kernel.package is None:
        return []
    binaries = kernel.package.binaries
    running = [binaries[key] for key in kernel.steps[setting].binaries if key in binaries]
    return running or list(binaries.values())


def _binaries_data(
    kernel: KernelFacts, package: KernelPackage, target: Target
) -> list[dict[str, object]]:
    found = []
    for key, binary in package.binaries.items():
        resources, held = binary.resources, occupancy(binary.resources, target)
        found.append(
            {
                "function": binary.function,
                "key": key,
                "runs_at": [s for s, step in kernel.steps.items() if key in step.binaries],
                "registers": resources.registers,
                "spilled_bytes": resources.spills,
                "local_bytes": resources.local_bytes,
                "shared_bytes": resources.shared,
                "threads": resources.threads,
                "blocks_per_sm": None if held is None else held.blocks,
                "occupancy": None if held is None else held.share,
                "limited_by": None if held is None else held.limited_by,
                "cubin_bytes": len(binary.cubin),
            }
        )
    return found


def _resources(binary: Binary, target: Target) -> tuple[str, ...]:
    """In the order of RESOURCES."""
    taken, held = binary.resources, occupancy(binary.resources, target)
    return (
        str(taken.registers),
        str(taken.spills),
        size(taken.shared),
        str(taken.threads),
        "–" if held is None else str(held.blocks),
        "–" if held is None else f"{held.share:.0%}",
    )


def _resources_text(binary: Binary, target: Target) -> str:
    taken, held = binary.resources, occupancy(binary.resources, target)
    spills = f"{taken.spills} B spilled" if taken.spills else "no spills"
    text = (
        f"{taken.registers} registers, {spills}, {size(taken.shared)} shared, {taken.threads} "
        f"threads, {size(len(binary.cubin))} of code"
    )
    if held is None:
        return text
    return (
        f"{text}; {held.blocks} blocks an SM, {held.warps} of {held.most_warps} warps "
        f"({held.share:.0%}), limited by {held.limited_by}"
    )


def _launch_text(launch: Launch) -> str:
    grid = " × ".join(map(str, launch.grid))
    constants = ", ".join(f"{name}={value}" for name, value in launch.constexprs.items())
    return f"grid {grid}, {launch.num_warps} warps" + (f", {constants}" if constants else "")


def _step_text(step: Step) -> str:
    return f"{_count(step.launches, 'launch', 'launches')} a step"


def _costs(step: Step) -> tuple[str, str, str]:
    """In the order of COSTS."""
    return number(step.flops), size(step.bytes), duration(step.seconds)


def _count(number: int, word: str, plural: str) -> str:
    return f"{number} {word if number == 1 else plural}"

"""The text of ``tilewright inspect``: tables as plain data, for the terminal and for JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.image import EngineImage
from ...targets import Target
from .facts import (
    DECODE,
    PREFILL,
    CallCost,
    Setting,
    bindings,
    call_costs,
    duration,
    fallback_lines,
    final_graph,
    headline,
    kv_bytes_per_token,
    number,
    op_label,
    pass_rows,
    size,
    weight_bytes,
    weight_sizes,
)
from .kernel_view import (
    FOOTNOTE,
    has_kernels,
    kernel_columns,
    kernel_data,
    kernel_rows,
    origin_text,
    sum_lines,
    sums_data,
)
from .kernels import kernel_report
from .memory import memory_facts

MOST_WEIGHTS = 6


@dataclass(frozen=True, slots=True)
class Section:
    """One table: the first ``left`` columns are text, the others figures."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int = 1
    footnote: str = ""


def sections(image: EngineImage) -> list[Section]:
    """Every table, in reading order."""
    return [_passes(image), *_ops(image), *_kernels(image), _weights(image), _memory(image)]


def as_data(image: EngineImage) -> dict[str, object]:
    """The same as plain data, with figures as numbers."""
    return {
        "facts": dict(headline(image)),
        "kind": image.kind,
        "passes": pass_rows(image),
        "costs": {
            setting.name: [
                {"op": op, "calls": n, "flops": flops, "bytes": moved, "roofline_seconds": seconds}
                for op, n, flops, moved, seconds in by_op(_costs(part, setting))
            ]
            for part, chosen in parts(image)
            for setting in chosen
        },
        **kernels_data(image),
        "weight_bytes": weight_bytes(image),
        "kv_bytes_per_token": kv_bytes_per_token(image),
        "memory": {setting.name: memory_facts(image, setting) for setting in settings(image)},
        "quantization": image.report.get("quantization"),
        "notes": fallback_lines(image),
    }


def parts(image: EngineImage) -> list[tuple[EngineImage, tuple[Setting, ...]]]:
    """The image of each Program, and the settings that it runs."""
    chosen = settings(image)
    if image.decode is None:
        return [(image, chosen)]
    return [(image.decoding, chosen[:1]), (image, chosen[1:])]


def _costs(image: EngineImage, setting: Setting) -> list[CallCost]:
    graph = final_graph(image)
    return call_costs(graph, Target.parse(image.target), bindings(graph, image, setting))


def settings(image: EngineImage) -> tuple[Setting, ...]:
    """The sizes to evaluate at: decode and prefill for a causal LM, its own for a module."""
    if image.lm is None:
        return (Setting("call", 8, 8),)
    longest = image.lm.max_model_len
    if longest >= PREFILL.tokens:
        return (DECODE, PREFILL)
    return (Setting("decode", 1, longest), Setting("prefill", longest, longest))


def by_op(costs: Sequence[CallCost]) -> list[tuple[str, int, int, int, float]]:
    """(op, calls, FLOPs, bytes, roofline seconds) of each op, the slowest first."""
    groups: dict[str, list[CallCost]] = defaultdict(list)
    for cost in costs:
        groups[op_label(cost.node)].append(cost)
    rows = [
        (op, len(g), sum(c.flops for c in g), sum(c.bytes for c in g), sum(c.seconds for c in g))
        for op, g in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row[4], row[0]))


def kernels(image: EngineImage) -> list[tuple[tuple[str, str], int]]:
    """((kernel, the ops it computes), calls), most calls first."""
    counts = Counter((call.kernel, origin_text(call.origin)) for call in image.program.calls)
    return counts.most_common()


def kernels_data(image: EngineImage) -> dict[str, object]:
    """Each kernel (``kernels``, and ``decode_kernels`` where decode steps have a Program of their
    own), and of a Triton engine what a step comes to (``steps``).
    """
    if not has_kernels(image):
        rows = [{"kernel": k, "ops": o, "calls": n} for (k, o), n in kernels(image)]
        return {"kernels": rows}
    target, steps = Target.parse(image.target), {}
    found: list[list[dict[str, object]]] = []
    for part, chosen in parts(image):
        report = kernel_report(part, chosen)
        found.append([kernel_data(kernel, target) for kernel in report.kernels])
        steps.update(sums_data(report))
    decode: dict[str, object] = {} if image.decode is None else {"decode_kernels": found[0]}
    return {"kernels": found[-1], "steps": steps, **decode}


def _passes(image: EngineImage) -> Section:
    rows = []
    for index, row in enumerate(pass_rows(image), start=1):
        nodes = row.get("nodes")
        before, after = nodes if isinstance(nodes, list) else ("?", "?")
        error = row.get("max_error")
        rows.append(
            (
                f"{index:03d}",
                str(row.get("name")),
                str(before),
                str(after),
                duration(float(str(row.get("seconds", 0)))),
                f"{error:.1e}" if isinstance(error, float) else "–",
            )
        )
    columns = ("", "pass", "nodes before", "after", "time", "largest error")
    return Section(
        "Passes", columns, rows, 2, "Graph texts: --pass NAME; changes: --diff NAME NAME."
    )


def _ops(image: EngineImage) -> list[Section]:
    target = Target.parse(image.target)
    found = []
    for part, setting in ((part, one) for part, chosen in parts(image) for one in chosen):
        costs = _costs(part, setting)
        whole = sum(cost.seconds for cost in costs) or 1.0
        rows = [
            (op, str(n), number(flops), size(moved), duration(s), f"{s / whole:.1%}")
            for op, n, flops, moved, s in by_op(costs)
        ]
        title = f"Ops at {setting.name}: T = {setting.tokens}, context {setting.context}"
        foot = (
            f"total: {number(sum(c.flops for c in costs))} FLOP, "
            f"{size(sum(c.bytes for c in costs))}, at least {duration(whole)} "
            f"at the peak rates of {target}"
        )
        columns = ("op", "calls", "FLOP", "bytes", "roofline", "share")
        found.append(Section(title, columns, rows, 1, foot))
    return found


def _kernels(image: EngineImage) -> list[Section]:
    if has_kernels(image):
        return [_compiled_kernels(part, chosen) for part, chosen in parts(image)]
    rows = [(kernel, ops, str(count)) for (kernel, ops), count in kernels(image)]
    return [Section("Kernel calls of the Program", ("kernel", "computes", "calls"), rows, 2)]


def _compiled_kernels(image: EngineImage, chosen: Sequence[Setting]) -> Section:
    report = kernel_report(image, chosen)
    rows = kernel_rows(report, Target.parse(image.target), chosen)
    names = " and ".join(setting.name for setting in chosen)
    title = f"Kernels: launches at {names}; FLOP, bytes and roofline at {chosen[0].name}"
    foot = "\n".join((*sum_lines(report, chosen), FOOTNOTE))
    return Section(title, kernel_columns(chosen), rows, 2, foot)


def _weights(image: EngineImage) -> Section:
    sizes = weight_sizes(image)
    rows = [(name, size(count)) for name, count in sizes[:MOST_WEIGHTS]]
    rest = sizes[MOST_WEIGHTS:]
    if rest:
        rows.append((f"{len(rest)} others", size(sum(count for _, count in rest))))
    return Section("Weights", ("largest", "size"), rows, 1, f"total: {size(weight_bytes(image))}")


def _memory(image: EngineImage) -> Section:
    rows = []
    for setting in settings(image):
        facts = memory_facts(image, setting)
        rows.append(
            (
                setting.name,
                str(facts["buffers"]),
                size(facts["sum_bytes"]),
                size(facts["arena_bytes"]),
                size(facts["live_bytes"]),
            )
        )
    columns = ("step", "buffers", "without reuse", "arena", "most alive at once")
    return Section("Memory plan of intermediate values", columns, rows)

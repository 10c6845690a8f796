"""How ``bench serve`` shows its figures: as plain data, under vLLM's keys, and as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from .console import out
from .tables import facts_table, plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from ..bench.machine import Machine
    from ..bench.serving import Distribution, Served

METRICS = ("ttft", "tpot", "itl", "e2el", "queue")
STATISTICS = ("mean", "median", "std", "p90", "p99")


def serving_data(found: Served, machine: Machine, asked: Mapping[str, object]) -> dict[str, object]:
    """The figures as plain data: those that `vllm bench serve` has too under its names, times in
    milliseconds as there (``p99_ttft_ms``).

    Args:
        found: the figures.
        machine: that gave them.
        asked: what was run.
    """
    rate = asked["rate"]
    return {
        "machine": asdict(machine),
        # JSON knows no infinity; vLLM writes it as text too.
        "asked": {**asked, "rate": "inf" if rate == math.inf else rate},
        "duration": found.seconds,
        "completed": found.completed,
        "failed": found.failed,
        "errors": list(found.errors),
        "total_input_tokens": found.input_tokens,
        "total_output_tokens": found.output_tokens,
        "request_throughput": found.request_throughput,
        "request_goodput": found.goodput,
        "output_throughput": found.output_throughput,
        "total_token_throughput": found.total_throughput,
        "max_concurrent_requests": found.most_at_once,
        **{
            f"{statistic}_{metric}_ms": getattr(_of(found, metric), statistic) * 1e3
            for metric in METRICS
            for statistic in STATISTICS
        },
        "prefix_cache_queries": found.prefix_queries,
        "prefix_cache_hits": found.prefix_hits,
        "prefix_cache_hit_rate": found.prefix_hit_rate,
        "num_preemptions": found.preemptions,
        "phases": {
            name: {**asdict(phase), "tokens_per_second": phase.tokens_per_second}
            for name, phase in found.phases.items()
        },
    }


def _of(found: Served, metric: str) -> Distribution:
    distribution: Distribution = getattr(found, metric)
    return distribution


def print_serving(found: Served, machine: Machine, asked: Mapping[str, object]) -> None:
    """The figures as tables, on stdout."""
    console = out()
    console.print(facts_table(_facts(found, asked)))
    console.print()
    table = plain_table(("ms", *STATISTICS))
    for metric in METRICS:
        of = _of(found, metric)
        values = (f"{getattr(of, statistic) * 1e3:.2f}" for statistic in STATISTICS)
        table.add_row(metric.upper() if metric != "queue" else "queue time", *values)
    console.print(table)
    console.print()
    console.print(_phases(found))
    for error in found.errors:
        console.print(f"failed: {error}", style="red", markup=False)
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    console.print(
        f"{machine.target} ({machine.device}), load {machine.load:.1f}; {versions}. MFU is of the "
        "linears, MBU of weights and context, both of peak rates",
        style="dim",
    )


def _facts(found: Served, asked: Mapping[str, object]) -> list[tuple[str, str]]:
    rate = "all at once" if asked["rate"] == math.inf else f"{asked['rate']:g} requests/s"
    limit = asked["concurrency"]
    facts = [
        ("load", f"{asked['workload']}, {rate}" + (f", at most {limit} at once" if limit else "")),
        (
            "requests",
            f"{found.completed} completed, {found.failed} failed in {found.seconds:.2f} s, "
            f"{found.most_at_once} at once",
        ),
        ("tokens", f"{found.input_tokens} in, {found.output_tokens} out"),
        ("throughput", f"{found.request_throughput:.2f} requests/s"),
        ("", f"{found.output_throughput:.1f} output tok/s, {found.total_throughput:.1f} in all"),
    ]
    if found.goodput is not None:
        facts.append(("goodput", f"{found.goodput:.2f} requests/s, {found.good} requests"))
    hit_rate = found.prefix_hit_rate
    if hit_rate is not None:
        hits = f"{hit_rate:.1%} of {found.prefix_queries} prompt tokens found"
        facts.append(("prefix cache", hits))
    elif not asked["prefix_caching"]:
        facts.append(("prefix cache", "off"))
    return [*facts, ("preemptions", str(found.preemptions))]


def _phases(found: Served) -> Table:
    table = plain_table(("steps", "", "tokens", "tok/s", "ms a step", "MFU", "MBU"))
    for name, phase in found.phases.items():
        if phase.steps:
            table.add_row(
                name,
                str(phase.steps),
                str(phase.tokens),
                f"{phase.tokens_per_second:.1f}",
                f"{phase.seconds / phase.steps * 1e3:.2f}",
                *("" if share is None else f"{share:.1%}" for share in (phase.mfu, phase.mbu)),
            )
    return table

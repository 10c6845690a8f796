"""Cuts of experts of many pairs on a GPU: kernels by descriptors beside those by pointers.

    python benchmarks/bench_wide_experts.py [--layers mixtral,qwen3_moe] [--tokens 4096,512,256]
                                            [--rivals grouped_mm] [--seconds 30] [--json FILE]

Layers, inputs, float64 and rivals are bench_experts.py's. Each layer is a process of its own, and
so are its rivals: one that hangs or fails after ``--seconds`` leaves the others' lines. A table of
all cuts stands behind, in microseconds of a whole layer, and what each launch of the fastest takes.
Exit code 1 where a result is further from float64 than torch's own bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_experts import LAYERS, SLACK, Case, Layer, Run, measured, ours, product_rate, rival
from graph_timing import read_rate

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.experts import experts_source
from tilewright.codegen.triton.kernels.experts_tiles import (
    PRODUCTS,
    Groups,
    GroupTiles,
    default_groups,
)
from tilewright.codegen.triton.kernels.wide_experts_tiles import WideTiles, takes_wide
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.package import KernelPackage
from tilewright.targets import Target

Cell = tuple[str, int]
ROUNDED = 1e-2  # of a result's norm, between two orders of sums in bfloat16
ROUNDS = 2  # in which all are timed, the least counts: a GPU that throttles slows who comes late


SMALL = 128  # pairs an expert up to which tiles of 64 or fewer are tried
CUTS: Mapping[str, Groups] = {
    "128": (WideTiles(128, 128, 64, 8, 3), WideTiles(128, 256, 64, 8, 3)),
    "128, group 8": (WideTiles(128, 128, 64, 8, 3, 8), WideTiles(128, 256, 64, 8, 3, 8)),
    "128, not flat": (
        WideTiles(128, 128, 64, 8, 3, flat=False),
        WideTiles(128, 256, 64, 8, 3, flat=False),
    ),
    "128, gate_up not flat": (
        WideTiles(128, 128, 64, 8, 3, flat=False),
        WideTiles(128, 256, 64, 8, 3),
    ),
    "128, down shared": (
        WideTiles(128, 128, 64, 8, 3),
        WideTiles(128, 256, 64, 8, 3, shared=True),
    ),
    "128, long steps": (WideTiles(128, 128, 128, 8, 2), WideTiles(128, 256, 64, 8, 3)),
    "64": (WideTiles(64, 128, 64, 8, 4), WideTiles(64, 256, 64, 8, 4)),
    "64, long steps": (WideTiles(64, 128, 128, 8, 2), WideTiles(64, 256, 128, 8, 2)),
    "64, two a multiprocessor": (WideTiles(64, 128, 64, 4, 2), WideTiles(64, 256, 64, 4, 2)),
    "by pointers, 64, long steps": (GroupTiles(64, 64, 128, 4, 2), GroupTiles(64, 128, 128, 4, 2)),
    "by pointers, 64, short rows": (GroupTiles(64, 32, 128, 4, 3), GroupTiles(64, 64, 128, 4, 3)),
    "by pointers, 32, short rows": (GroupTiles(32, 32, 128, 4, 4), GroupTiles(32, 64, 128, 4, 4)),
}


def cuts_of(layer: Layer, tokens: int, target: Target) -> dict[str, Groups]:
    """By name, the present ones first."""
    p = layer.problem
    assert takes_wide(p, target), "of bfloat16 in dense rows, on a GPU with descriptors"
    found: dict[str, Groups] = {}
    few = tokens * p.slots <= SMALL * p.experts
    for block_m in (128, 64, 32, 16):
        first, second = (default_groups(p, product, target, block_m) for product in PRODUCTS)
        assert first is not None and second is not None
        found[f"by pointers, {block_m}"] = first, second
    found |= CUTS
    return {name: cut for name, cut in found.items() if cut[0].block_m == 128 or few}


class Stepped(LaunchedKernel):
    """A kernel each of whose launches ends before the next one begins."""

    def launch(self, *arguments: Any) -> None:
        super().launch(*arguments)
        torch.cuda.synchronize()


def launches(layer: Layer, package: KernelPackage, case: Case) -> dict[str, float]:
    """Microseconds of each launch of a call, by the profiler."""
    kernel = Stepped(package, layer.node.types, (), torch.device("cuda", 0))
    x, ids, weights = case.inputs[0]
    operands = [x, ids, weights, *layer.weights, None, None]
    kernel(operands, {"T": len(x)})
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(4):
            kernel(operands, {"T": len(x)})
    return {
        event.key.removeprefix("experts_"): event.device_time_total / event.count
        for event in profile.key_averages()
        if event.key.startswith("experts_")
    }


def our_records(layer: Layer, tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Of each cut at each number of tokens; what launches take, of the fastest and the present."""
    target = Target.detect()
    rates = read_rate(), product_rate()
    print(
        f"{layer.name}: read {rates[0] / 1e9:.0f} GB/s, {rates[1] / 1e12:.0f} TFLOP/s", flush=True
    )
    for count in tokens:
        case = Case(layer, count, rates)
        cuts = cuts_of(layer, count, target)
        every = [experts_source(layer.problem, target, None, [(c, None)]) for c in cuts.values()]
        packages = dict(zip(cuts, compile_sources(every, target.arch), strict=True))
        for name, package in packages.items():
            if any(taken.spills for taken in package.resources):
                print(f"{layer.name}: {name} spills", flush=True)
        records: dict[str, dict[str, Any]] = {}
        first = ours(layer, next(iter(packages.values())))(*case.inputs[0]).float()
        for _ in range(ROUNDS):
            for name, package in packages.items():
                record = _timed(case, name, partial(_run_like, first, layer, package, case))
                before = records.get(name, record)
                records[name] = min(before, record, key=lambda r: r.get("microseconds", 1e9))
        best = min(records, key=lambda name: records[name].get("microseconds", 1e9))
        for name in (best, "by pointers, 128"):
            try:
                records[name]["launches"] = launches(layer, packages[name], case)
            except Exception as error:  # a profiler that fails costs its lines alone
                records[name]["launches"] = {f"no profile: {error}": 0.0}
        yield from ({**record, "floor": case.floor * 1e6} for record in records.values())


def _run_like(first: torch.Tensor, layer: Layer, package: KernelPackage, case: Case) -> Run:
    """A kernel's call; ValueError where its result for all tokens is far from the ``first`` one."""
    run = ours(layer, package)
    apart = float((run(*case.inputs[0]).float() - first).norm() / first.norm())
    if not apart < ROUNDED:
        raise ValueError(f"{apart:.1e} apart")
    return run


def _timed(case: Case, name: str, make: Callable[[], Run]) -> dict[str, Any]:
    record = {**measured(case, name, make), "torchs": case.torchs}
    found = record.get("failed") or f"{record['microseconds']:.1f} us"
    print(f"{case.layer.name:10} {case.tokens:5} {name:30} {found}", flush=True)
    return record


def rival_records(
    layer: Layer, tokens: Sequence[int], rivals: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Of each rival at each number of tokens."""
    for count in tokens:
        case = Case(layer, count, (3e12, 7e14))
        for name in rivals:
            yield _timed(case, name, partial(rival, layer, name, count))


def child(options: argparse.Namespace, tokens: Sequence[int]) -> None:
    """Writes the records of one layer, a line each, as they come."""
    layer = Layer.of(options.child)
    rivals = [name for name in options.rivals.split(",") if name]
    found = rival_records(layer, tokens, rivals) if rivals else our_records(layer, tokens)
    with options.json.open("w", encoding="utf-8") as file:
        for record in found:
            file.write(json.dumps(record) + "\n")
            file.flush()


def records_of(layer: str, rivals: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a process of a layer wrote before it ended or was ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        command = [sys.executable, __file__, "--child", layer, "--tokens", options.tokens]
        command += ["--rivals", rivals, "--json", str(path)]
        try:
            done = subprocess.run(command, timeout=options.seconds, check=False)
            if done.returncode:
                print(f"{layer}, {rivals or 'ours'}: exit code {done.returncode}", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{layer}, {rivals or 'ours'}: more than {options.seconds} s", flush=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each cut and rival, a column for each layer and number of tokens."""
    cells = list(dict.fromkeys((r["layer"], r["tokens"]) for r in records))
    rows: dict[str, dict[Cell, str]] = {"": {cell: f"{cell[0]} {cell[1]}" for cell in cells}}
    for r in records:
        cell = r["layer"], r["tokens"]
        found = r.get("failed", "")[:16] or f"{r['microseconds']:.1f}"
        wrong = r.get("error", 0.0) > SLACK * r["torchs"]
        rows.setdefault(r["by"], {})[cell] = found + (" WRONG" if wrong else "")
        if "floor" in r:
            rows.setdefault("floor", {})[cell] = f"{r['floor']:.1f}"
    lines = [
        f"{name:30}" + "".join(f"{row.get(cell, '-'):>18}" for cell in cells)
        for name, row in rows.items()
    ]
    for r in records:
        if "launches" in r:
            taken = ", ".join(f"{name} {each:.1f}" for name, each in r["launches"].items())
            lines.append(f"{r['layer']} {r['tokens']} {r['by']}: {taken}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, measures in processes of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--tokens", default="4096,512,256")
    parser.add_argument("--rivals", default="grouped_mm")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options, list(map(int, options.tokens.split(","))))
        return 0
    records: list[dict[str, Any]] = []
    for rivals in ("", options.rivals):
        if rivals or not records:
            for layer in options.layers.split(","):
                records += records_of(layer, rivals, options)
            print(table(records), flush=True)
    if options.json is not None:
        options.json.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    mine = [r for r in records if r["by"] not in options.rivals.split(",")]
    wrong = any("failed" in r or r["error"] > SLACK * r["torchs"] for r in mine)
    return 1 if wrong or not mine else 0


if __name__ == "__main__":
    sys.exit(main())

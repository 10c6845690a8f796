"""append_kv on a GPU: rope and the write into the cache in one launch, each cut of it, against the
memory's rate.

    python benchmarks/bench_append_kv.py [--batches 1,8,32,128] [--all] [-o lines.jsonl]

32 query and 8 KV heads of 128 in bfloat16. In a step the product just wrote q, k and v, which lie
in L2: so they do here. The cache is cold: each call writes to other slots of a large one. A call's
bytes are the rows read and written. Every cut is held against float64 first; exit code 1 if one is
wrong. ``--all`` times the whole search space that fits, else the default alone; ``--list`` names
what would be timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from graph_timing import read_rate, report, seconds_of

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.append_kv import (
    SPACE,
    Problem,
    Tiles,
    append_kv_source,
    default_tiles,
    fits,
)
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.package import KernelPackage
from tilewright.codegen.triton.source import has_pdl
from tilewright.ir.build import input_node, make, reshape
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS, Target

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
COLD_BYTES = 200_000_000  # of a cache: four times the H100's L2
CALLS = 200
OP = schema("append_kv")


def append_node() -> Node:
    """The call of a Llama-like layer, over symbols T and N: q, k and v are parts of one product."""
    T, N = symbol("T"), symbol("N")

    def tensor(name: str, *shape: Size, dtype: DType = DType.BF16) -> Node:
        return input_node(name, TensorType(dtype, shape))

    merged = tensor("qkv", T, (HEADS + 2 * KV_HEADS) * DIM)
    parts, start = [], 0
    for count in (HEADS, KV_HEADS, KV_HEADS):
        part = make("slice", merged, dim=1, start=start, stop=start + count * DIM)
        parts.append(reshape(part, T, count, DIM))
        start += count * DIM
    q, k, v = parts
    caches = (tensor(name, N, PAGE, KV_HEADS, DIM) for name in ("k_cache", "v_cache"))
    tables = (tensor(name, T, DIM // 2) for name in ("cos", "sin"))
    slots = tensor("slots", T, dtype=DType.I64)
    return make("append_kv", k, v, *caches, slots, q, *tables, stepwise=True)


def problem_of(node: Node) -> Problem:
    """What the template sees."""
    found = Problem.of(node, tuple(None if a is None else located(a)[1] for a in node.args))
    assert found is not None
    return found


def cuts(problem: Problem, whole: bool) -> list[Tiles]:
    """The default first, then all others that fit if the ``whole`` space is wanted."""
    rest = (Tiles(*values) for values in itertools.product(*SPACE.values()))
    found = [default_tiles(problem), *(tiles for tiles in rest if whole and fits(problem, tiles))]
    return list(dict.fromkeys(found))


class Case:
    """Buffers of one batch size, and slots for many calls."""

    def __init__(self, batch: int, caches: Sequence[torch.Tensor]) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        draw = {"generator": generator, "device": "cuda"}
        self.batch, self.caches = batch, caches
        self.qkv = torch.randn(batch, (HEADS + 2 * KV_HEADS) * DIM, **draw).bfloat16()
        angles = torch.rand(batch, DIM // 2, **draw) * 6
        self.tables = (angles.cos().bfloat16(), angles.sin().bfloat16())
        places = torch.randperm(caches[0].shape[0] * PAGE, **draw)
        self.slots = places[: CALLS * batch].view(CALLS, batch)

    @property
    def nbytes(self) -> int:
        """Bytes that a call reads and writes."""
        return 2 * self.qkv.nbytes + 2 * self.tables[0].nbytes + self.slots[0].nbytes

    @property
    def sizes(self) -> dict[str, int]:
        """The value of each symbol."""
        return {"T": self.batch, "N": self.caches[0].shape[0]}

    def operands(self, index: int) -> list[torch.Tensor | None]:
        """Buffers of the call of that number."""
        k_cache, v_cache = self.caches
        rest = (self.slots[index % CALLS], self.qkv, *self.tables, None, None)
        return [self.qkv, self.qkv, k_cache, v_cache, *rest]

    def error(self, found: Sequence[torch.Tensor]) -> float:
        """The largest error of q and of the rows of the first call, over what the op's tolerance
        allows; inf for NaN.
        """
        q, k, v = (
            part.unflatten(1, (-1, DIM)).double()
            for part in self.qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 1)
        )
        page = [x.new_zeros(1, self.batch, KV_HEADS, DIM) for x in (k, v)]
        order = torch.arange(self.batch, device="cuda")
        cos, sin = (table.double() for table in self.tables)
        k_rows, v_rows, turned = OP.reference(k, v, *page, order, q, cos, sin, stepwise=True)
        written = [cache.flatten(0, 1)[self.slots[0]] for cache in found[:2]]
        relative, absolute = OP.tolerance[DType.BF16]
        worst = 0.0
        pairs = zip((found[2], *written), (turned, k_rows[0], v_rows[0]), strict=True)
        for ours, wanted in pairs:
            off = (ours.double() - wanted).abs() / (absolute + relative * wanted.abs())
            worst = max(worst, float(off.nan_to_num(torch.inf).max()))
        return worst


def timed(case: Case, tiles: Tiles, package: KernelPackage, rate: float, out: Path | None) -> bool:
    """Measures a cut on a case, unless it is wrong; whether it is right."""
    from tilewright.codegen.triton.launch import LaunchedKernel

    node, device = append_node(), torch.device("cuda", 0)
    kernel = LaunchedKernel(package, node.types, OP.aliases, device)
    error = case.error(kernel(case.operands(0), case.sizes))
    seconds = float("nan")
    if error <= 1.0:
        seconds = seconds_of(lambda index: kernel(case.operands(index), case.sizes), CALLS)
    share = case.nbytes / seconds / rate
    record = {
        "kernel": "append_kv",
        "batch": case.batch,
        "tiles": asdict(tiles),
        "microseconds": seconds * 1e6,
        "share_of_read": share,
        "registers": [r.registers for r in package.resources],
        "error": error,
    }
    name = f"heads {tiles.block_heads} warps {tiles.num_warps}"
    text = f"B{case.batch:<4} {name:20} {seconds * 1e6:7.2f} us {share:6.3f} error {error:.2f}"
    report(record, text, out)
    return error <= 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, and prints a line a cut."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    target = TARGETS["h100"] if options.list else Target.detect()
    problem = problem_of(append_node())
    tried = cuts(problem, options.all)
    sources = [append_kv_source(problem, tiles, has_pdl(target)) for tiles in tried]
    if options.list:
        for tiles, source in zip(tried, sources, strict=True):
            print(tiles, source.digest[:8])
        return 0
    packages = compile_sources(sources, target.arch)
    rate = read_rate()
    print(f"{torch.cuda.get_device_name()}, read {rate / 1e9:.0f} GB/s")
    pages = COLD_BYTES // (PAGE * KV_HEADS * DIM * 2)
    caches = [
        torch.zeros(pages, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda") for _ in "kv"
    ]
    wrong = 0
    for batch in map(int, options.batches.split(",")):
        case = Case(batch, caches)
        for tiles, package in zip(tried, packages, strict=True):
            wrong += not timed(case, tiles, package, rate, options.output)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

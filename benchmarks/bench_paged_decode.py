"""Paged decode attention on a GPU: each cut of the kernel, cold, against the memory's rate.

    python benchmarks/bench_paged_decode.py -o decode.jsonl [--cases B32] [--variants "n64 w4"]
        [--cache-dtype fp8]

32 query and 8 KV heads of 128 in bfloat16. Calls go over several caches in turn, larger than L2
together, in one CUDA graph; consecutive launches overlap where the kernel asks for it. Rows are
held against the op's reference in float64 before anything is timed. A line is a case and a cut;
exit code 1 if one is wrong. With --between a small kernel stands before each call, as in a model's
step, and its own time is taken off. With --cache-dtype the caches hold codes, and the truth is
what these stand for; bytes are those of codes and scales.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from graph_timing import read_rate, report, seconds_of

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.invocation import plan_call
from tilewright.codegen.triton.kernels.paged_attention import emit_paged_attention
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem
from tilewright.codegen.triton.kernels.paged_decode import paged_decode_source
from tilewright.codegen.triton.kernels.paged_decode_tiles import Tiles, fits
from tilewright.codegen.triton.kernels.scaled_attention import emit_scaled_attention
from tilewright.codegen.triton.kernels.scaled_decode import scaled_decode_source
from tilewright.codegen.triton.kernels.scaled_tiles import decode_fits, scaled_problem
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.package import KernelPackage
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS, Target

HEADS, KV_HEADS, DIM = 32, 8, 128
CODES = {"auto": None, "fp8": DType.F8E4M3, "int8": DType.I8}
USUAL_RATE = 3e12  # bytes a second, to choose a number of calls by
COLD_BYTES = 200_000_000  # of the caches that calls take in turn: four times the H100's L2
MOST_CALLS = 288
SHAPES = ((1, 8192), (32, 4096), (128, 1024), (1, 512), (8, 1024), (32, 1024))
BASE = Tiles(64, 4, 3)
OP = schema("paged_attention")


def token_bytes(codes: DType | None) -> int:
    """Of the keys and values of a token: in bfloat16, or as codes with two scales a KV head."""
    return KV_HEADS * 2 * (2 * DIM if codes is None else DIM + 4)


def variants() -> list[Tiles]:
    """The cuts that are compared: one thing changed at a time, and a few that belong together."""
    found = [replace(BASE, num_stages=s) for s in (2, 3, 4, 5)]
    found += [replace(BASE, waves=w) for w in (1, 3, 4, 6, 8)]
    found += [replace(BASE, num_stages=4, waves=w) for w in (3, 4)]
    found += [Tiles(32, w, s) for w, s in ((1, 4), (2, 4), (4, 3), (4, 4), (4, 5))]
    found += [Tiles(32, 4, 4, waves=w) for w in (4, 8)]
    found += [Tiles(16, 1, 5, waves=4), Tiles(16, 2, 5, waves=4)]
    found += [Tiles(64, w, 3) for w in (2, 8)] + [Tiles(64, 8, 4)]
    found += [Tiles(128, 4, 2), Tiles(128, 8, 2), Tiles(128, 8, 3)]
    found += [replace(BASE, prefetch=p) for p in (1, 2, 4)]
    found += [replace(BASE, num_stages=4, prefetch=2)]  # the default
    found += [replace(BASE, min_keys=k) for k in (128, 256)]
    found += [replace(BASE, by_page=False), replace(BASE, evict_first=True)]
    found += [replace(BASE, fixed_split_keys=k) for k in (512, 1024)]
    return found


def name_of(tiles: Tiles | None) -> str:
    """A cut in short; None is the general kernel, which serves prefill too."""
    if tiles is None:
        return "general"
    t = tiles
    text = f"n{t.block_n} w{t.num_warps} s{t.num_stages} x{t.waves} k{t.min_keys}"
    text += f" p{t.prefetch}" * bool(t.prefetch) + " by-row" * (not t.by_page)
    text += " evict" * t.evict_first
    return text + (f" fixed{t.fixed_split_keys}" if t.fixed_split_keys else "")


def decode_node(
    page: int,
    general: bool = False,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_dim: int = DIM,
    codes: DType | None = None,
) -> Node:
    """The call, over symbols B, M and N; ``general`` with the operand query_start, ``codes`` with
    caches of these.
    """
    B, M, N = map(symbol, "BMN")

    def tensor(name: str, *shape: Size, dtype: DType = DType.BF16) -> Node:
        return input_node(name, TensorType(dtype, shape))

    held = codes or DType.BF16
    scales = [tensor(f"{x}_scale", N, page, kv_heads, 1, dtype=DType.F32) for x in "kv"]
    return make(
        "paged_attention" if codes is None else "scaled_paged_attention",
        tensor("q", B, heads, head_dim),
        tensor("k", N, page, kv_heads, head_dim, dtype=held),
        tensor("v", N, page, kv_heads, head_dim, dtype=held),
        tensor("tables", B, M, dtype=DType.I32),
        tensor("lens", B, dtype=DType.I32),
        tensor("starts", B + 1, dtype=DType.I32) if general else None,
        None,
        None,
        *(() if codes is None else scales),
        scale=head_dim**-0.5,
    )


def source_of(
    tiles: Tiles | None, page: int, target: Target, codes: DType | None = None
) -> KernelSource | None:
    """The kernel of a cut; None where it does not fit the target."""
    node = decode_node(page, general=tiles is None, codes=codes)
    layouts = tuple(None if arg is None else located(arg)[1] for arg in node.args)
    if tiles is None:
        emit = emit_paged_attention if codes is None else emit_scaled_attention
        return emit(node, layouts, target)
    if codes is not None:
        scaled = scaled_problem(node, layouts, target)
        assert scaled is not None
        there = decode_fits(scaled, tiles, target)
        return scaled_decode_source(scaled, tiles, target) if there else None
    problem = Problem.of(node, layouts)
    assert problem is not None
    return paged_decode_source(problem, tiles, target) if fits(problem, tiles, target) else None


@dataclass
class Case:
    """Buffers of one shape: ``tables`` has a table for each of the caches, which share a pool."""

    batch: int
    keys: int
    page: int
    q: torch.Tensor
    pools: Sequence[torch.Tensor]
    tables: Sequence[torch.Tensor]
    lens: torch.Tensor
    starts: torch.Tensor
    codes: DType | None = None

    @classmethod
    def of(
        cls,
        batch: int,
        keys: int,
        page: int,
        capacity: int,
        pools: Sequence[torch.Tensor],
        codes: DType | None = None,
    ) -> Case:
        """Random pages of the pools for as many caches as are cold, two at least. Pools are keys
        and values, of codes their scales too.
        """
        pages = batch * (keys // page)
        pools = [pool.view(-1, page, KV_HEADS, pool.shape[-1]) for pool in pools]
        copies = max(2, -(-COLD_BYTES // (batch * keys * token_bytes(codes))))
        ids = torch.randperm(pools[0].shape[0], device="cuda", dtype=torch.int32)
        width = max(capacity, keys) // page
        tables = []
        for copy in range(copies):
            table = torch.full((batch, width), 1 << 30, dtype=torch.int32, device="cuda")
            some = ids[copy * pages : (copy + 1) * pages]
            table[:, : keys // page] = some.view(batch, -1)
            tables.append(table)
        q = torch.randn(batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        lens = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
        starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        return cls(batch, keys, page, q, pools, tables, lens, starts, codes)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that a call has to read."""
        return self.batch * self.keys * token_bytes(self.codes)

    @property
    def sizes(self) -> dict[str, int]:
        """The value of each symbol."""
        width = self.tables[0].shape[1]
        return {"B": self.batch, "M": width, "N": self.pools[0].shape[0]}

    def operands(self, copy: int, general: bool) -> list[torch.Tensor | None]:
        """Operands of a call on one of the caches."""
        table = self.tables[copy % len(self.tables)]
        starts = self.starts if general else None
        keys, values, *scales = self.pools
        return [self.q, keys, values, table, self.lens, starts, None, None, *scales]

    @cached_property
    def rows(self) -> list[int]:
        """Some rows, whose results are checked."""
        return sorted({0, self.batch // 2, self.batch - 1})

    @cached_property
    def wanted(self) -> torch.Tensor:
        """Their results on the first cache by the reference, in float64."""
        tables = self.tables[0][self.rows, : self.keys // self.page]
        ids = tables.flatten().long()
        numbers = (pool.view(torch.uint8)[ids].view(pool.dtype).double() for pool in self.pools)
        keys, values, *scales = numbers
        caches = [keys * scales[0], values * scales[1]] if scales else [keys, values]
        # The gathered pages stand one behind the other.
        own = torch.arange(tables.numel(), device="cuda").view_as(tables)
        q, lens = self.q[self.rows].double(), self.lens[self.rows]
        wanted = OP.reference(q, *caches, own, lens, None, scale=DIM**-0.5)
        assert isinstance(wanted, torch.Tensor)
        return wanted

    def error(self, found: torch.Tensor) -> float:
        """The largest error of the rows, over what the op's tolerance allows; inf for NaN."""
        relative, absolute = OP.tolerance[DType.BF16]
        off = (found[self.rows].double() - self.wanted).abs()
        return float((off / (absolute + relative * self.wanted.abs())).nan_to_num(torch.inf).max())


def measured(
    case: Case, kernel: Callable[..., Sequence[torch.Tensor]], general: bool, between: bool
) -> tuple[float, float]:
    """(seconds a call, error): no time for a kernel that is wrong."""
    operands = [case.operands(copy, general) for copy in range(len(case.tables))]
    (found,) = kernel(operands[0], case.sizes)
    error = case.error(found)
    if not error <= 1.0:
        return float("nan"), error
    count = len(operands)
    wanted = max(count, min(MOST_CALLS, int(2e-3 * USUAL_RATE / case.nbytes)))
    calls = -(-wanted // count) * count
    small, sizes = torch.zeros(1024, device="cuda"), case.sizes

    def pause(index: int) -> None:
        small.add_(1.0)

    def run(index: int) -> None:
        if between:
            pause(index)
        kernel(operands[index % count], sizes)

    return seconds_of(run, calls) - (seconds_of(pause, calls) if between else 0.0), error


def main() -> int:
    """Measures, prints a line each and writes JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--cases", default="", help="only those whose name has this in it")
    parser.add_argument("--variants", default="", help="only those whose name has this in it")
    parser.add_argument("--pages", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--capacity", type=int, default=0, help="tokens of the block table's rows")
    parser.add_argument("--cache-dtype", choices=CODES, default="auto", help="of the caches")
    parser.add_argument("--between", action="store_true", help="a small kernel before each call")
    parser.add_argument("--list", action="store_true", help="build the kernels' text, run nothing")
    options = parser.parse_args()
    target = TARGETS["h100"] if options.list else Target.detect()
    cuts: list[Tiles | None] = [None, *variants()]
    cuts = [t for t in dict.fromkeys(cuts) if options.variants in name_of(t)]
    codes = CODES[options.cache_dtype]
    built = [(t, page, source_of(t, page, target, codes)) for page in options.pages for t in cuts]
    kept = [(t, page, source) for t, page, source in built if source is not None]
    if options.list:
        for tiles, page, source in kept:
            print(f"page {page:3} {name_of(tiles):30} {source.digest[:8]}")
        return 0
    return run_all(options, target, kept)


def run_all(
    options: argparse.Namespace,
    target: Target,
    kept: Sequence[tuple[Tiles | None, int, KernelSource]],
) -> int:
    """Every case with every kernel of its page size; 1 if one is wrong."""
    packages = compile_sources([source for _, _, source in kept], target.arch)
    shapes = [s for s in SHAPES if options.cases in f"B{s[0]} S{s[1]}"]
    codes = CODES[options.cache_dtype]
    tokens = max(2 * b * s + COLD_BYTES // token_bytes(codes) for b, s in shapes)
    rate = read_rate()
    print(f"{torch.cuda.get_device_name()}, read {rate / 1e9:.0f} GB/s")
    pools = pools_of(-(-tokens // 256) * 256, codes)
    wrong = 0
    for (batch, keys), page in itertools.product(shapes, options.pages):
        case = Case.of(batch, keys, page, options.capacity, pools, codes)
        for (tiles, of_page, _), package in zip(kept, packages, strict=True):
            if of_page == page:
                record = record_of(case, tiles, package, options.between, rate)
                report(record, line_of(record), options.output)
                wrong += not record["error"] <= 1.0
    return 1 if wrong else 0


def pools_of(tokens: int, codes: DType | None) -> list[torch.Tensor]:
    """Keys and values of so many tokens, [tokens, KV heads, D]; as codes, scales behind them."""
    shape = (tokens, KV_HEADS, DIM)
    numbers = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
    if codes is None:
        return numbers
    rounded = schema("quantize_rows").reference
    pairs = [rounded(x, dtype=codes) for x in numbers]
    return [part for parts in zip(*pairs, strict=True) for part in parts]


def record_of(
    case: Case, tiles: Tiles | None, package: KernelPackage, between: bool, read: float
) -> dict[str, Any]:
    """What is written of a kernel on a case; ``read`` is the memory's rate in bytes a second."""
    from tilewright.codegen.triton.launch import LaunchedKernel

    node = decode_node(case.page, general=tiles is None, codes=case.codes)
    kernel = LaunchedKernel(package, node.types, (), torch.device("cuda", 0))
    seconds, error = measured(case, kernel, tiles is None, between)
    rate = case.nbytes / seconds
    return {
        "batch": case.batch,
        "keys": case.keys,
        "page": case.page,
        "cache": str(case.codes or DType.BF16),
        "variant": name_of(tiles),
        "tiles": None if tiles is None else asdict(tiles),
        "grids": [g for _, g, _ in plan_call(package.source, node.types, case.sizes).launches],
        "registers": [r.registers for r in package.resources],
        "shared": [r.shared for r in package.resources],
        "microseconds": seconds * 1e6,
        "gb_per_s": rate * 1e-9,
        "share_of_read": rate / read,
        "error": error,
        "between": between,
    }


def line_of(record: Mapping[str, Any]) -> str:
    """A record for reading."""
    case = f"B{record['batch']} S{record['keys']} P{record['page']}"
    return (
        f"{case:16} {record['variant']:26} {record['microseconds']:8.2f} µs "
        f"{record['gb_per_s']:6.0f} GB/s {record['share_of_read']:6.3f} "
        f"error {record['error']:.2f} grids {record['grids']}"
    )


if __name__ == "__main__":
    sys.exit(main())

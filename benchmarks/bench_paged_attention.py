"""Paged attention over ragged tokens on a GPU: causal prefill, each cut of the kernel beside the
scaled_dot_product_attention of torch (cuDNN and FlashAttention) in the same run.

    python benchmarks/bench_paged_attention.py [--lengths 2048,8192] [--all] [-o lines.jsonl]
        [--cache-dtype fp8] [--sequences 8]

One sequence, or several of one length, 32 query and 8 KV heads of 128 in bfloat16; ours reads K and
V from scattered pages, torch from one piece. TFLOP/s count the half of the scores that a causal
mask leaves. Some rows are held against float64 first; exit code 1 if one is wrong. ``--all`` times
the search space that fits,
``--tiles 128x64x8x2`` these beside the default (rows, keys, warps, stages, and programs of the
Hopper kernel); ``--list`` names what
would be timed. With ``--cache-dtype`` ours reads
codes, and torch the numbers that they stand for.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from graph_timing import report, seconds_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.paged_attention import prefill_source
from tilewright.codegen.triton.kernels.paged_attention_tiles import (
    PREFILL,
    SPACE,
    Problem,
    Tiles,
    default_tiles,
    shared_bytes,
)
from tilewright.codegen.triton.kernels.prefill_steps import shares_of
from tilewright.codegen.triton.kernels.scaled_attention import scaled_attention_source
from tilewright.codegen.triton.kernels.scaled_tiles import (
    prefill_fits,
    prefill_tiles,
    scaled_problem,
)
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

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
CALLS = 5
RIVALS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
CODES = {"auto": None, "fp8": DType.F8E4M3, "int8": DType.I8}
OP = schema("paged_attention")


def attention_node(
    heads: int = HEADS, kv_heads: int = KV_HEADS, head_dim: int = DIM, codes: DType | None = None
) -> Node:
    """The call, over symbols T, B, M and N; ``codes`` with caches of these."""
    T, B, M, N = map(symbol, "TBMN")

    def tensor(name: str, *shape: Size, dtype: DType = DType.BF16) -> Node:
        return input_node(name, TensorType(dtype, shape))

    held = codes or DType.BF16
    caches = (tensor(name, N, PAGE, kv_heads, head_dim, dtype=held) for name in "kv")
    scales = [tensor(f"{x}_scale", N, PAGE, kv_heads, 1, dtype=DType.F32) for x in "kv"]
    return make(
        "paged_attention" if codes is None else "scaled_paged_attention",
        tensor("q", T, heads, head_dim),
        *caches,
        tensor("tables", B, M, dtype=DType.I32),
        tensor("lens", B, dtype=DType.I32),
        tensor("starts", B + 1, dtype=DType.I32),
        None,
        None,
        *(() if codes is None else scales),
        scale=head_dim**-0.5,
    )


def problem_of(node: Node) -> Problem:
    """What the template sees."""
    layouts = tuple(None if a is None else located(a)[1] for a in node.args)
    scaled = node.op == "scaled_paged_attention"
    found = scaled_problem(node, layouts) if scaled else Problem.of(node, layouts)
    assert found is not None
    return found


def variants(
    problem: Problem, target: Target, more: Sequence[Tiles]
) -> list[tuple[Tiles, KernelSource]]:
    """The defaults first, the plain kernel's among them, then what fits of others; each for any
    number of tokens.
    """
    if problem.node.op == "scaled_paged_attention":
        return _over_codes(problem, target, more)
    shares = shares_of(problem, target, lambda steps: None)
    plain = default_tiles(problem, target, PREFILL)
    assert plain is not None
    return [
        (tiles, prefill_source(problem, tiles))
        for tiles in dict.fromkeys([*(share.tiles for share in shares), plain, *more])
        if shared_bytes(problem, tiles) <= target.shared_memory_per_block
    ]


def _over_codes(
    problem: Problem, target: Target, more: Sequence[Tiles]
) -> list[tuple[Tiles, KernelSource]]:
    default = prefill_tiles(problem, target)
    assert default is not None
    tried = dict.fromkeys([default, *more])
    fitting = [tiles for tiles in tried if prefill_fits(problem, tiles, target)]
    return [(tiles, scaled_attention_source(problem, tiles)) for tiles in fitting]


@dataclass
class Case:
    """Sequences of ``length`` tokens, all of them new; the caches may hold codes."""

    length: int
    codes: DType | None = None
    sequences: int = 1

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(heads: int) -> torch.Tensor:
            shape = (self.sequences * self.length, heads, DIM)
            return torch.randn(shape, generator=generator, device="cuda").bfloat16()

        self.q, self.k, self.v = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)
        each = -(-self.length // PAGE)
        pages = self.sequences * each
        tables = torch.randperm(pages + 7, generator=generator, device="cuda")[:pages]
        self.tables = tables.int().view(self.sequences, each)
        self.caches = [self._scattered(rows) for rows in (self.k, self.v)]
        self.scales: list[torch.Tensor] = []
        self.numbers = self.caches
        if self.codes is not None:
            rounded = schema("quantize_rows").reference
            pairs = [rounded(x.nan_to_num(0.0), dtype=self.codes) for x in self.caches]
            self.caches, self.scales = ([pair[i] for pair in pairs] for i in range(2))
            self.numbers = [codes.double() * scales for codes, scales in pairs]
            slots = self.tables.long()
            self.k, self.v = (
                x[slots].flatten(1, 2)[:, : self.length].flatten(0, 1).bfloat16()
                for x in self.numbers
            )

    def _scattered(self, rows: torch.Tensor) -> torch.Tensor:
        sequences, each = self.tables.shape
        shape = (sequences * each + 7, PAGE, KV_HEADS, DIM)
        cache = torch.full(shape, torch.nan, device="cuda").bfloat16()
        padded = cache.new_full((sequences, each * PAGE, KV_HEADS, DIM), torch.nan)
        padded[:, : self.length] = rows.unflatten(0, (sequences, self.length))
        cache[self.tables.long()] = padded.unflatten(1, (each, PAGE))
        return cache

    @property
    def flops(self) -> float:
        """Of both products, under the causal mask."""
        return 2.0 * self.length**2 * HEADS * DIM * self.sequences

    @property
    def sizes(self) -> dict[str, int]:
        """The value of each symbol."""
        count, pages = self.tables.shape
        return {"T": count * self.length, "B": count, "M": pages, "N": count * pages + 7}

    @property
    def operands(self) -> list[torch.Tensor | None]:
        """Of the call."""
        ends = torch.arange(self.sequences + 1, dtype=torch.int32, device="cuda") * self.length
        lens = torch.full_like(ends[1:], self.length)
        metadata = (self.tables, lens, ends, None, None)
        return [self.q, *self.caches, *metadata, *self.scales]

    def sdpa(self, backend: SDPBackend) -> Callable[[int], torch.Tensor]:
        """Torch's call, result [S, H, D]; heads of K and V are repeated where it groups none."""
        parts = (x.unflatten(0, (self.sequences, self.length)) for x in (self.q, self.k, self.v))
        q, k, v = (x.transpose(1, 2).contiguous() for x in parts)
        repeated = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v)]

        def grouped(index: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return found.transpose(1, 2).flatten(0, 1)

        def each(index: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                found = F.scaled_dot_product_attention(q, *repeated, is_causal=True)
            return found.transpose(1, 2).flatten(0, 1)

        try:
            grouped(0)
        except RuntimeError:
            return each
        return grouped

    def error(self, found: torch.Tensor) -> float:
        """The largest error of some rows, over what the op's tolerance allows; inf for NaN."""
        some = {0, 1, 15, 16, 127, 128, self.length // 3, self.length - 2, self.length - 1}
        which = [0] * len(some) + [self.sequences - 1] * len(some)
        tokens = torch.tensor([*sorted(some), *sorted(some)], device="cuda")
        rows = torch.tensor(which, device="cuda") * self.length + tokens
        # Each as the last token of a sequence of its own over the same pages.
        tables = self.tables[which]
        caches = (cache.double() for cache in self.numbers)
        lens = (tokens + 1).int()
        wanted = OP.reference(self.q[rows].double(), *caches, tables, lens, scale=DIM**-0.5)
        assert isinstance(wanted, torch.Tensor)
        relative, absolute = OP.tolerance[DType.BF16]
        off = (found[rows].double() - wanted).abs() / (absolute + relative * wanted.abs())
        return float(off.nan_to_num(torch.inf).max())


def timed(
    case: Case,
    name: str,
    run: Callable[[int], torch.Tensor],
    more: dict[str, object],
    out: Path | None,
) -> bool:
    """Measures what gives right rows; whether it does."""
    error = case.error(run(0))
    seconds = seconds_of(run, CALLS) if error <= 1.0 else float("nan")
    rate = case.flops / seconds
    record = {
        "kernel": "paged_attention",
        "length": case.length,
        "sequences": case.sequences,
        "cache": str(case.codes or DType.BF16),
        "variant": name,
        "microseconds": seconds * 1e6,
        "tflop_per_s": rate * 1e-12,
        "error": error,
        **more,
    }
    shape = f"{case.sequences} x {case.length}"
    text = f"{shape:9} {name:24} {seconds * 1e6:9.1f} us {rate * 1e-12:6.1f} TFLOP/s"
    report(record, f"{text} error {error:.2f}", out)
    return error <= 1.0


def kernel_of(case: Case, package: KernelPackage) -> Callable[[int], torch.Tensor]:
    """A call of ours."""
    from tilewright.codegen.triton.launch import LaunchedKernel

    types = attention_node(codes=case.codes).types
    kernel = LaunchedKernel(package, types, (), torch.device("cuda", 0))
    operands, sizes = case.operands, case.sizes
    return lambda index: kernel(operands, sizes)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, and prints a line a variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--tiles", default="", help="by commas")
    parser.add_argument("--cache-dtype", choices=CODES, default="auto", help="of the caches")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    target = TARGETS["h100"] if options.list else Target.detect()
    codes = CODES[options.cache_dtype]
    more = [Tiles(*map(int, text.split("x"))) for text in options.tiles.split(",") if text]
    if options.all:
        more = [Tiles(*values) for values in itertools.product(*SPACE.values())]
    tried = variants(problem_of(attention_node(codes=codes)), target, more)
    if options.list:
        for tiles, source in tried:
            print(tiles, source.digest[:8])
        return 0
    packages = compile_sources([source for _, source in tried], target.arch)
    print(torch.cuda.get_device_name())
    wrong = 0
    for length in map(int, options.lengths.split(",")):
        case = Case(length, codes, options.sequences)
        for name, backend in RIVALS.items():
            try:
                timed(case, f"torch {name}", case.sdpa(backend), {}, options.output)
            except RuntimeError as failure:  # torch without this backend
                print(f"torch {name}: {str(failure).splitlines()[0]}")
        for (tiles, _), package in zip(tried, packages, strict=True):
            name = "m{block_m} n{block_n} w{num_warps} s{num_stages}".format(**asdict(tiles))
            name += f" p{tiles.programs}" if tiles.programs else ""
            resources = [r.registers for r in package.resources]
            more = {"tiles": asdict(tiles), "registers": resources}
            wrong += not timed(case, name, kernel_of(case, package), more, options.output)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

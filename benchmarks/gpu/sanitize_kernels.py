"""One small case of each kernel of a decode step, launched once: for compute-sanitizer to watch.

    python benchmarks/gpu/sanitize_kernels.py --compile-only
    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 \
        python benchmarks/gpu/sanitize_kernels.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/gpu/sanitize_kernels.py

The first line fills the cache of compiled kernels, so that the others start no compilers. There are
no CUDA graphs, every tensor has an allocation of its own, whose end memcheck knows, and what is
compared is computed on the CPU. The last line of the output is "done".
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read when torch first allocates

import torch

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.generate import emit_fused
from tilewright.codegen.triton.kernels.append_kv import emit_append_kv
from tilewright.codegen.triton.kernels.linear import linear_source
from tilewright.codegen.triton.kernels.linear_tiles import GemmTiles, GemvTiles
from tilewright.codegen.triton.kernels.linear_tiles import Problem as LinearProblem
from tilewright.codegen.triton.kernels.paged_attention import emit_paged_attention
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem as PagedProblem
from tilewright.codegen.triton.kernels.paged_decode import paged_decode_source
from tilewright.codegen.triton.kernels.paged_decode_tiles import default_tiles
from tilewright.codegen.triton.kernels.sample import emit_sample
from tilewright.codegen.triton.layout import Layout, located
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.build import input_node, make, reshape
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS, Target

B, T, M, N, R = map(symbol, "BTMNR")
BF16, I32 = DType.BF16, DType.I32
LENGTHS, PAGE, HEADS, KV_HEADS, DIM = (37, 1, 70), 16, 8, 2, 64
Operands = list[torch.Tensor | None]


@dataclass(frozen=True)
class Case:
    """A call on the CPU's tensors.

    Attributes:
        name: of the line that is printed.
        source, node: the kernel, and what it computes.
        operands, sizes: buffers, and the value of each symbol.
        views: the operands as the op's reference takes them.
    """

    name: str
    source: KernelSource
    node: Node
    operands: Operands
    sizes: Mapping[str, int]
    views: Sequence[torch.Tensor | None]


def tensor(name: str, *shape: Size, dtype: DType = BF16) -> Node:
    """An input."""
    return input_node(name, TensorType(dtype, shape))


def layouts_of(node: Node) -> tuple[Layout | None, ...]:
    """Where the operands lie."""
    return tuple(None if arg is None else located(arg)[1] for arg in node.args)


def normal(*shape: int) -> torch.Tensor:
    """Random numbers in bfloat16."""
    return torch.randn(shape).bfloat16()


def linear_cases(target: Target) -> list[Case]:
    """A norm, gate and up, for one token and for several; a residual, in parts."""
    up, down = _linear_node(True), _linear_node(False)
    shared = (GemmTiles(16, 32, 64, 4, 2), GemmTiles(16, 64, 32, 4, 3, splits=2, ahead=64))
    found = []
    for name, node, tokens, tiles in (
        ("linear, one token", up, 1, shared[0]),
        ("linear, several tokens", up, 5, shared[0]),
        ("linear, in parts", down, 19, shared[1]),
    ):
        problem = LinearProblem.of(node, layouts_of(node))
        assert problem is not None
        gemv = GemvTiles(2, 64, 2) if tokens == 1 else None
        source = linear_source(problem, target, gemv, [tiles])
        assert source is not None
        shapes = ([tokens if size == B else int(str(size)) for size in o.shape] for o in node.args)
        operands: Operands = [normal(*shape) * 0.3 for shape in shapes]
        found.append(Case(name, source, node, operands, {"B": tokens}, operands))
    return found


def _linear_node(up: bool) -> Node:
    k, n = 200, 72
    x, inputs = tensor("x", B, k), []
    weight = tensor("weight", 2 * n if up else n, k)
    if up:
        inputs = [x, tensor("scale", k), weight]
        product = make("linear", make("rms_norm", x, inputs[1], eps=1e-5), weight, None)
        halves = (make("slice", product, dim=1, start=s, step=1, stop=s + n) for s in (0, n))
        result = make("gated", *halves, activation="silu")
    else:
        inputs = [x, weight, tensor("residual", B, n)]
        result = make("add", inputs[2], make("linear", x, weight, None))
    body = Graph("linear", tuple(inputs), (result,))
    outer = [input_node(f"outer_{i}", node.type) for i, node in enumerate(inputs)]
    return make("fused", *outer, body=body, kind="linear")


def attention_cases(target: Target) -> list[Case]:
    """Decode in splits that are merged, and the general kernel in both of its variants."""
    decode = _attention_node(None)
    problem = PagedProblem.of(decode, layouts_of(decode))
    assert problem is not None
    tiles = default_tiles(problem, target)
    assert tiles is not None
    tiles = replace(tiles, block_n=32, min_keys=32, prefetch=1, num_stages=2)
    source = paged_decode_source(problem, tiles, target, 3)
    operands, sizes = _attention_operands([1] * len(LENGTHS), starts=False)
    found = [Case("paged_decode", source, decode, operands, sizes, operands)]
    node = _attention_node(B + 1)
    general = emit_paged_attention(node, layouts_of(node), target)
    assert general is not None
    for name, counts in (("decode", [1, 1, 1]), ("prefill", [5, 1, 33])):
        operands, sizes = _attention_operands(counts, starts=True)
        found.append(Case(f"paged_attention, {name}", general, node, operands, sizes, operands))
    return found


def _attention_node(starts: Size | None) -> Node:
    rows = B if starts is None else T
    return make(
        "paged_attention",
        tensor("q", rows, HEADS, DIM),
        tensor("k", N, PAGE, KV_HEADS, DIM),
        tensor("v", N, PAGE, KV_HEADS, DIM),
        tensor("tables", B, M, dtype=I32),
        tensor("lens", B, dtype=I32),
        None if starts is None else tensor("starts", starts, dtype=I32),
        tensor("sinks", HEADS),
        None,
        scale=DIM**-0.5,
    )


def _attention_operands(counts: Sequence[int], starts: bool) -> tuple[Operands, dict[str, int]]:
    """Sequences of LENGTHS, so many tokens of each now; what lies beyond lengths is poison."""
    pages = [-(-length // PAGE) for length in LENGTHS]
    width, total = max(pages) + 1, sum(pages) + 1
    tables = torch.full((len(LENGTHS), width), 1 << 30, dtype=torch.int32)
    ids = iter(torch.randperm(total).tolist())
    caches = [torch.full((total, PAGE, KV_HEADS, DIM), torch.nan).bfloat16() for _ in "kv"]
    for b, length in enumerate(LENGTHS):
        for place in range(pages[b]):
            page = tables[b, place] = next(ids)
            for cache in caches:
                rows = cache[page, : length - place * PAGE]
                rows.copy_(torch.randn(rows.shape))
    ends = torch.tensor([0, *counts]).cumsum(0).int()
    rows = sum(counts)
    operands: Operands = [
        normal(rows, HEADS, DIM),
        *caches,
        tables,
        torch.tensor(LENGTHS, dtype=torch.int32),
        ends if starts else None,
        normal(HEADS),
        None,
    ]
    return operands, {"T": rows, "B": len(LENGTHS), "M": width, "N": total}


def append_case(target: Target) -> Case:
    """Norms, rope and the write into the cache, of parts of one product."""
    merged = tensor("qkv", T, (HEADS + 2 * KV_HEADS) * DIM)
    parts, start = [], 0
    for count in (HEADS, KV_HEADS, KV_HEADS):
        part = make("slice", merged, dim=1, start=start, stop=start + count * DIM)
        parts.append(reshape(part, T, count, DIM))
        start += count * DIM
    q, k, v = parts
    caches = [tensor(name, N, PAGE, KV_HEADS, DIM) for name in ("k_cache", "v_cache")]
    tables = [tensor(name, T, DIM // 2) for name in ("cos", "sin")]
    weights = [tensor(name, DIM) for name in ("q_weight", "k_weight")]
    slots = tensor("slots", T, dtype=DType.I64)
    node = make("append_kv", k, v, *caches, slots, q, *tables, *weights, eps=1e-5)
    source = emit_append_kv(node, layouts_of(node), target)
    assert source is not None
    count = 5
    qkv = normal(count, (HEADS + 2 * KV_HEADS) * DIM)
    rest = [normal(3, PAGE, KV_HEADS, DIM) for _ in "kv"]
    more = [normal(count, DIM // 2), normal(count, DIM // 2), normal(DIM), normal(DIM)]
    places = torch.tensor([47, 0, 17, 5, 31])
    split = qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 1)
    q_rows, k_rows, v_rows = (part.unflatten(1, (-1, DIM)) for part in split)
    operands: Operands = [qkv, qkv, *rest, places, qkv, *more]
    views = [k_rows, v_rows, *(cache.clone() for cache in rest), places, q_rows, *more]
    return Case("append_kv", source, node, operands, {"T": count, "N": 3}, views)


def sample_case(target: Target) -> Case:
    """Greedy rows, and rows of every cut."""
    vocab, names = 9001, schema("sample").operands[1:]
    given = [tensor(n, R, dtype=I32 if n == "top_k" else DType.F32) for n in names]
    node = make("sample", tensor("logits", R, vocab), *given)
    source = emit_sample(node, layouts_of(node), target)
    assert source is not None
    rows = torch.tensor(
        [
            (0.0, 0, 1.0, 0.0, 0.5),
            (0.8, 0, 1.0, 0.0, 0.3),
            (0.8, 0, 1.0, 0.05, 0.3),
            (0.8, 50, 0.9, 0.0, 0.6),
            (9.0, 0, 0.95, 0.0, 0.6),
        ]
    )
    columns = [column.contiguous() for column in rows.T]
    columns[1] = columns[1].int()
    operands: Operands = [normal(len(rows), vocab), *columns]
    return Case("sample", source, node, operands, {"R": len(rows)}, operands)


def fused_case(target: Target) -> Case:
    """A generated kernel: the embedding, a sum and its norm."""
    table, ids, other = tensor("table", 50, 300), tensor("ids", T, dtype=I32), tensor("y", T, 300)
    weight = tensor("weight", 300)
    added = make("add", make("embedding", table, ids), other)
    body = Graph(
        "fused", (table, ids, other, weight), (added, make("rms_norm", added, weight, eps=1e-5))
    )
    node = make("fused", *body.inputs, body=body, kind="reduction")
    source = emit_fused(node, layouts_of(node), target)
    assert source is not None
    picked = torch.tensor([0, 49, 7], dtype=torch.int32)
    operands: Operands = [normal(50, 300), picked, normal(3, 300), normal(300)]
    return Case("generated", source, node, operands, {"T": 3}, operands)


def cases(target: Target) -> list[Case]:
    """All of them."""
    torch.manual_seed(0)
    singles = [append_case(target), sample_case(target), fused_case(target)]
    return [*linear_cases(target), *attention_cases(target), *singles]


def check(case: Case, found: Sequence[torch.Tensor]) -> None:
    """The results are those of the op's reference, but for rounding."""
    wanted = schema(case.node.op).reference(*case.views, **dict(case.node.attrs))
    for ours, theirs in zip(found, (wanted,) if torch.is_tensor(wanted) else wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2, equal_nan=True)


def main() -> None:
    """Runs each case once, and prints its name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile-only", action="store_true", help="for an H100 where none is")
    options = parser.parse_args()
    cpu = options.compile_only and not torch.cuda.is_available()
    target = TARGETS["h100"] if cpu else Target.detect()
    tried = cases(target)
    packages = compile_sources([case.source for case in tried], target.arch)
    if options.compile_only:
        print("compiled", sum(len(package.binaries) for package in packages), "launches")
        return
    from tilewright.codegen.triton.launch import LaunchedKernel

    device = torch.device("cuda", 0)
    for case, package in zip(tried, packages, strict=True):
        aliases = schema(case.node.op).aliases
        kernel = LaunchedKernel(package, case.node.types, aliases, device)
        operands = [None if x is None else x.to(device) for x in case.operands]
        found = [result.cpu() for result in kernel(operands, case.sizes)]
        check(case, found)
        print(case.name, flush=True)
    print("done")


if __name__ == "__main__":
    main()

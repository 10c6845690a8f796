"""Prefill attention on an H100, several ways: what the engine chooses by itself, cuts of the plain
kernel and of Hopper's, cuDNN.

    python benchmarks/gpu/trial_attention.py [--shapes few|many|long] [--ways NAME …] [--head-dim N]

32 query heads and 8 KV heads, bf16, causal; keys and values lie on shuffled pages for our kernels,
in a row for cuDNN, which takes no ragged batches here. Ours are compiled and launched as the engine
does. Each way is first checked in float64 on sampled tokens, with NaN where the cache is unwritten,
then timed by replays of a CUDA graph over rotated buffers. All are compiled side by side; then one
process measures them in turn, and is replaced where a kernel hangs (20 s) or breaks the device. The
table comes last, and under it what the engine chose.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from trials import Line, compile_all, measured, say, us_of

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.invocation import plan_call
from tilewright.codegen.triton.kernels.hopper_attention import ROWS, WARPS
from tilewright.codegen.triton.kernels.paged_attention import emit_paged_attention, prefill_source
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem, Tiles
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.package import KernelPackage
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType
from tilewright.targets import Target

H, G, PAGE = 32, 8, 16
COPIES = 3  # inputs that replays rotate over
Pairs = tuple[tuple[int, int], ...]
FEW: dict[str, Pairs] = {  # tokens and keys of sequences
    "128": ((128, 128),),
    "256": ((256, 256),),
    "320": ((320, 320),),
    "384": ((384, 384),),
    "448": ((448, 448),),
    "512": ((512, 512),),
    "1024": ((1024, 1024),),
    "128 behind": ((128, 8192),),
    "512 behind": ((512, 8192),),
    "mixed tiny": ((1, 1100),) * 12 + ((116, 116),),
    "mixed few": ((1, 1100),) * 30 + ((96, 96),) * 2,
    "mixed 512": ((1, 1100),) * 60 + ((452, 452),),
    "ragged": ((37, 37), (1, 70), (300, 300), (160, 933), (64, 128)),
}
MANY: dict[str, Pairs] = {
    "2048": ((2048, 2048),),
    "4096": ((4096, 4096),),
    "8192": ((8192, 8192),),
    "chunk": ((2048, 8192),),
    "chunk 4096": ((4096, 12288),),
    "8x1024": ((1024, 1024),) * 8,
    "32x256": ((256, 256),) * 32,
    "mixed": ((1, 1100),) * 120 + ((1024, 1024),) * 8,
    "mixed 2048": ((1, 1100),) * 60 + ((1988, 1988),),
    "mixed behind": ((1024, 1024),) * 8 + ((1, 1100),) * 120,
}
LONG = {name: MANY[name] for name in ("2048", "4096", "8192", "chunk")}
SETS = {"few": FEW, "many": MANY, "long": LONG}
NARROW = "128 4s"  # fits heads of 64 alone


@dataclass(frozen=True)
class Way:
    """A way to compute attention.

    Attributes:
        kind: engine (its own choice), cut (of ours), cudnn.
        tiles: of a cut.
    """

    kind: str
    tiles: Tiles | None = None


def _hopper(block_n: int, stages: int, *, both_ways: bool = False) -> Tiles:
    return Tiles(ROWS, block_n, WARPS, stages, Target.detect().sms, both_ways)


def ways() -> dict[str, Way]:
    """All ways by name."""
    plain = {
        "plain 64x64 4w 2s": Tiles(64, 64, 4, 2),
        "plain 64x128 4w 2s": Tiles(64, 128, 4, 2),
        "plain 64x128 8w 2s": Tiles(64, 128, 8, 2),
    }
    hopper = {
        "128 2s": _hopper(128, 2),
        "128 2s two ways": _hopper(128, 2, both_ways=True),
        NARROW: _hopper(128, 4),
        "64 4s": _hopper(64, 4),
        "64 4s two ways": _hopper(64, 4, both_ways=True),
        "64 3s two ways": _hopper(64, 3, both_ways=True),
        "64 5s two ways": _hopper(64, 5, both_ways=True),
    }
    cuts = {name: Way("cut", tiles) for name, tiles in (plain | hopper).items()}
    return {"cudnn": Way("cudnn"), "engine": Way("engine")} | cuts


class Batch:
    """Sequences with their queries, and keys and values both in a row and on pages.

    Attributes:
        q: bf16 [T, H, D]; k, v: bf16 [S, G, D] of all sequences; k_cache, v_cache: bf16
            [N, P, G, D] with NaN where nothing was written; tables, lens, starts: i32.
    """

    def __init__(self, shape: Pairs, dim: int, seed: int) -> None:
        random = torch.Generator("cuda").manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=random, device="cuda").bfloat16()

        self.shape, self.dim, page = shape, dim, PAGE
        tokens, keys = sum(t for t, _ in shape), sum(s for _, s in shape)
        self.q, self.k, self.v = normal(tokens, H, dim), normal(keys, G, dim), normal(keys, G, dim)
        used = [-(-s // page) for _, s in shape]
        order = torch.randperm(sum(used), generator=random, device="cuda").int()
        self.tables = torch.zeros(len(shape), max(used), dtype=torch.int32, device="cuda")
        cells = (sum(used) * page, G, dim)
        caches = [torch.full(cells, torch.nan, device="cuda").bfloat16() for _ in "kv"]
        begun = read = 0
        for index, ((_, s), count) in enumerate(zip(shape, used, strict=True)):
            pages = order[begun : begun + count]
            self.tables[index, :count] = pages
            slots = (pages[:, None] * page + torch.arange(page, device="cuda")).flatten()[:s].long()
            for cache, rows in zip(caches, (self.k, self.v), strict=True):
                cache[slots] = rows[read : read + s]
            begun, read = begun + count, read + s
        self.k_cache, self.v_cache = (c.view(-1, page, G, dim) for c in caches)
        self.lens = torch.tensor([s for _, s in shape], dtype=torch.int32, device="cuda")
        starts = [sum(t for t, _ in shape[:i]) for i in range(len(shape) + 1)]
        self.starts = torch.tensor(starts, dtype=torch.int32, device="cuda")

    def worst(self, out: torch.Tensor) -> float:
        """The largest difference of a row of sampled tokens from float64, relative to the row."""
        worst = 0.0
        token = read = 0
        for tokens, keys in self.shape:
            picked = torch.unique(torch.linspace(0, tokens - 1, 48, device="cuda").long())
            q = self.q[token + picked].double().unflatten(1, (G, H // G))
            k = self.k[read : read + keys].double()
            v = self.v[read : read + keys].double()
            scores = torch.einsum("tghd,sgd->tghs", q, k) * self.dim**-0.5
            hidden = torch.arange(keys, device="cuda") > (keys - tokens + picked)[:, None]
            weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
            truth = torch.einsum("tghs,sgd->tghd", weights, v).flatten(1, 2)
            error = (out[token + picked].double() - truth).norm(dim=-1) / truth.norm(dim=-1)
            worst = max(worst, float(error.nan_to_num(1e9).max()))
            token, read = token + tokens, read + keys
        return worst


def node_of(dim: int) -> Node:
    """The call, over symbols T, B, M and N."""
    T, B, M, N = map(symbol, "TBMN")

    def tensor(name: str, *shape: Size, dtype: DType = DType.BF16) -> Node:
        return input_node(name, TensorType(dtype, shape))

    caches = (tensor(name, N, PAGE, G, dim) for name in "kv")
    sizes = {"tables": (B, M), "lens": (B,), "starts": (B + 1,)}
    told = (tensor(name, *shape, dtype=DType.I32) for name, shape in sizes.items())
    q = tensor("q", T, H, dim)
    return make("paged_attention", q, *caches, *told, None, None, scale=dim**-0.5)


def package_of(way: Way, dim: int) -> KernelPackage:
    """The kernels of a way as the engine compiles them."""
    node, target = node_of(dim), Target.detect()
    layouts = tuple(None if a is None else located(a)[1] for a in node.args)
    problem = Problem.of(node, layouts)
    assert problem is not None
    if way.tiles is None:
        source = emit_paged_attention(node, layouts, target)
        assert source is not None
    else:
        source = prefill_source(problem, way.tiles)
    (package,) = compile_sources([source], target.arch)
    return package


def sizes_of(batch: Batch) -> dict[str, int]:
    """The values of the call's symbols."""
    rows, width = batch.tables.shape
    return {"T": len(batch.q), "B": rows, "M": width, "N": len(batch.k_cache)}


def prepared(kernel: LaunchedKernel | None, batch: Batch) -> Callable[[], torch.Tensor]:
    """A call that computes a batch's attention [T, H, D]."""
    if kernel is not None:
        operands = (batch.q, batch.k_cache, batch.v_cache, batch.tables, batch.lens, batch.starts)
        sizes = sizes_of(batch)
        return lambda: kernel((*operands, None, None), sizes)[0]
    return _library(batch)


def _library(batch: Batch) -> Callable[[], torch.Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    count = len(batch.shape)
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (batch.q, batch.k, batch.v))

    def library() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
        return out.transpose(1, 2).flatten(0, 1)

    return library


def chosen(package: KernelPackage, batch: Batch) -> str:
    """What a step of the batch's sizes runs."""
    launch = plan_call(package.source, (), sizes_of(batch)).launches[0][0]
    return " ".join([launch.function, *(f"{n}={v}" for n, v in launch.constexprs.items())])


def measure(name: str, shapes: dict[str, Pairs], dim: int) -> Iterator[Line]:
    """A way's largest error and its time, for each shape."""
    way, kernel, package = ways()[name], None, None
    if way.kind in ("engine", "cut"):
        package = package_of(way, dim)
        kernel = LaunchedKernel(package, node_of(dim).types, [], torch.device("cuda", 0))
    for label, shape in shapes.items():
        if way.kind == "cudnn" and len(set(shape)) + (shape[0][0] != shape[0][1]) > 1:
            continue
        batches = [Batch(shape, dim, seed) for seed in range(COPIES)]
        calls = [prepared(kernel, batch) for batch in batches]
        errors = [batches[0].worst(calls[0]()) for _ in range(2)]
        us = us_of(calls, max(2, 4096 // len(batches[0].q)))
        line: Line = {"shape": label, "error": max(errors), "us": us}
        if package is not None and way.kind == "engine":
            line["chosen"] = chosen(package, batches[0])
        yield line


def compile_only(name: str, dim: int) -> None:
    """Compiles a way for the device; launches nothing."""
    for taken in package_of(ways()[name], dim).resources:
        said = f"{taken.registers} registers, {taken.spills} spilled, {taken.shared} B shared"
        print(f"compiled {name:20s} {said}", flush=True)


def table(lines: Sequence[Line], names: Sequence[str], shapes: dict[str, Pairs], dim: int) -> None:
    """Prints what was measured: for each shape the times, and each way's largest error."""
    times = {(x["name"], x["shape"]): float(str(x["us"])) for x in lines if "us" in x}
    print(
        f"\n{f'µs, heads of {dim}':20s}"
        + "".join(f"|{label:>12s} " for label in shapes)
        + "| error"
    )
    for name in names:
        row = f"{name:20s}"
        for label in shapes:
            us = times.get((name, label))
            row += f"|{'' if us is None else f'{us:.1f}':>12s} "
        errors = [float(str(x["error"])) for x in lines if x["name"] == name and "us" in x]
        failed = [str(x["failed"]) for x in lines if x["name"] == name and "failed" in x]
        print(f"{row}| {max(errors, default=0):.1e} {' '.join(failed)}")
    ours = [name for name in names if name not in ("cudnn", "engine")]
    row = f"{'engine / best':20s}"
    for label in shapes:
        best = [times[name, label] for name in ours if (name, label) in times]
        us = times.get(("engine", label))
        row += f"|{'' if us is None or not best else f'{us / min(best):.3f}':>12s} "
    print(f"{row}|")
    for line in lines:
        if "chosen" in line:
            print(f"{line['shape']:>14s}: {line['chosen']}")


def main() -> None:
    """Compiles side by side, measures in turn, prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", choices=SETS, default="many")
    parser.add_argument("--ways", nargs="*", choices=ways(), help="default: all")
    parser.add_argument("--head-dim", type=int, choices=(64, 128), default=128)
    parser.add_argument("--measure", nargs="*")
    parser.add_argument("--compile")
    options = parser.parse_args()
    shapes, dim = SETS[options.shapes], options.head_dim
    if options.measure:
        say(options.measure, lambda name: measure(name, shapes, dim))
        return
    if options.compile:
        compile_only(options.compile, dim)
        return
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    names = options.ways or [name for name in ways() if dim == 64 or name != NARROW]
    told = ["--shapes", options.shapes, "--head-dim", str(dim)]
    compile_all(__file__, [name for name in names if name != "cudnn"], 60, told)
    table(measured(__file__, names, told), names, shapes, dim)


if __name__ == "__main__":
    main()

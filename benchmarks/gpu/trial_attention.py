"""Prefill attention on an H100, several ways: Gluon's warp groups, the engine's kernel, libraries.

    python benchmarks/gpu/trial_attention.py

32 query heads and 8 KV heads of 128, bf16, causal; keys and values lie on shuffled pages for our
kernels, in a row for libraries, which take no ragged batches here. Each way is first checked in
float64 on sampled tokens, with NaN where the cache is unwritten, then timed by replays of a CUDA
graph over rotated buffers. All are compiled side by side; then one process measures them in turn,
and is replaced where a kernel hangs (20 s) or breaks the device. The table comes last.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from trials import Launch, Line, compile_all, measured, say, us_of, used_by

H, G, D = 32, 8, 128
SCALE = D**-0.5
COPIES = 3  # inputs that replays rotate over
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {  # tokens and keys of sequences
    "128": ((128, 128),),
    "256": ((256, 256),),
    "512": ((512, 512),),
    "2048": ((2048, 2048),),
    "8192": ((8192, 8192),),
    "ragged": ((37, 37), (1, 70), (300, 300), (160, 933), (64, 128)),
    "chunk": ((2048, 8192),),
    "8x1024": ((1024, 1024),) * 8,
    "mixed": ((1, 1100),) * 120 + ((1024, 1024),) * 8,
    "mixed few": ((1, 1100),) * 30 + ((96, 96),) * 2,
    "mixed behind": ((1024, 1024),) * 8 + ((1, 1100),) * 120,
}


@dataclass(frozen=True)
class Way:
    """A way to compute attention.

    Attributes:
        kind: gluon, paged (the engine's kernel), sdpa.
        options: of the kind.
    """

    kind: str
    options: dict[str, int | str]


WAYS = {
    "sdpa cudnn": Way("sdpa", {"backend": "CUDNN_ATTENTION"}),
    "engine 128x128 8w 1s": Way("paged", {"m": 128, "n": 128, "warps": 8, "stages": 1}),
    "engine 64x64 4w 2s": Way("paged", {"m": 64, "n": 64, "warps": 4, "stages": 2}),
    "gluon host": Way("gluon", {"block_n": 128, "stages": 2, "mixed": 0, "made": 0}),
    "gluon": Way("gluon", {"block_n": 128, "stages": 2, "mixed": 0, "made": 1}),
    "gluon two ways": Way("gluon", {"block_n": 128, "stages": 2, "mixed": 1, "made": 1}),
    "gluon 64 4s two ways": Way("gluon", {"block_n": 64, "stages": 4, "mixed": 1, "made": 1}),
}


class Batch:
    """Sequences with their queries, and keys and values both in a row and on pages.

    Attributes:
        q: bf16 [T, H, D]; k, v: bf16 [S, G, D] of all sequences; k_cache, v_cache: bf16
            [N, P, G, D] with NaN where nothing was written; tables, lens, starts: i32.
    """

    def __init__(self, shape: Sequence[tuple[int, int]], page: int, seed: int) -> None:
        random = torch.Generator("cuda").manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=random, device="cuda").bfloat16()

        self.shape, self.page = shape, page
        tokens, keys = sum(t for t, _ in shape), sum(s for _, s in shape)
        self.q, self.k, self.v = normal(tokens, H, D), normal(keys, G, D), normal(keys, G, D)
        self.out = torch.full_like(self.q, torch.nan)
        used = [-(-s // page) for _, s in shape]
        order = torch.randperm(sum(used), generator=random, device="cuda").int()
        self.tables = torch.zeros(len(shape), max(used), dtype=torch.int32, device="cuda")
        cells = (sum(used) * page, G, D)
        caches = [torch.full(cells, torch.nan, device="cuda").bfloat16() for _ in "kv"]
        begun = read = 0
        for index, ((_, s), count) in enumerate(zip(shape, used, strict=True)):
            pages = order[begun : begun + count]
            self.tables[index, :count] = pages
            slots = (pages[:, None] * page + torch.arange(page, device="cuda")).flatten()[:s].long()
            for cache, rows in zip(caches, (self.k, self.v), strict=True):
                cache[slots] = rows[read : read + s]
            begun, read = begun + count, read + s
        self.k_cache, self.v_cache = (c.view(-1, page, G, D) for c in caches)
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
            scores = torch.einsum("tghd,sgd->tghs", q, k) * SCALE
            hidden = torch.arange(keys, device="cuda") > (keys - tokens + picked)[:, None]
            weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
            truth = torch.einsum("tghs,sgd->tghd", weights, v).flatten(1, 2)
            error = (out[token + picked].double() - truth).norm(dim=-1) / truth.norm(dim=-1)
            worst = max(worst, float(error.nan_to_num(1e9).max()))
            token, read = token + tokens, read + keys
        return worst


def launch_gluon(batch: Batch, block_n: int, stages: int, mixed: int, made: int) -> Launch:
    """A launch of the Hopper kernel on a batch."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from tilewright.codegen.triton.kernels.hopper_attention_kernel import (
        _attend_described,
        _attend_hopper,
    )

    tokens, seqs = batch.q.shape[0], len(batch.shape)
    items = (tokens // (128 * G // H) + seqs + 2) * G
    page = batch.page
    grid = (min(items, torch.cuda.get_device_properties(0).multi_processor_count),)
    sizes = (tokens, seqs, batch.k_cache.shape[0], batch.tables.shape[1], items)
    read = (batch.tables, batch.lens, batch.starts, batch.out)
    cut = (G, H // G, D, SCALE, True, 0, page, block_n, stages, mixed)
    options = {"num_warps": 4}
    if made:
        strides = (0, H * D, D)
        args = (batch.q, batch.k_cache, batch.v_cache, *read, *strides, *sizes, *cut)
        return _attend_hopper, args, grid, options
    flat = gl.NVMMASharedLayout(128, 16, rank=2)
    deep = gl.NVMMASharedLayout(128, 16, rank=3)
    q = TensorDescriptor.from_tensor(batch.q, [64 * G // H, H // G, 64], deep)
    rows = [x.view(-1, G * D) for x in (batch.k_cache, batch.v_cache)]
    k, v = (TensorDescriptor.from_tensor(x, [page, 64], flat) for x in rows)
    return _attend_described, (q, k, v, *read, *sizes, *cut), grid, options


def launch_paged(batch: Batch, m: int, n: int, warps: int, stages: int) -> Launch:
    """A launch of the engine's kernel."""
    from tilewright.codegen.triton.kernels.paged_attention_kernel import _attend

    tokens, seqs = batch.q.shape[0], len(batch.shape)
    args = (batch.q, batch.k_cache, batch.v_cache, batch.tables, batch.lens, batch.starts, None,
            None, None, batch.out, None, None, None, 0, H * D, D, 1, tokens, seqs,
            batch.k_cache.shape[0], batch.tables.shape[1], batch.page, 1, G, H // G, 1, D, D, D, D,
            SCALE, None, True, None, 0, batch.page, True, m, n)  # fmt: skip
    grid = (tokens // (m * G // H) + seqs + 1, G, 1)
    return _attend, args, grid, {"num_warps": warps, "num_stages": stages}


def _scratch(size: int, align: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


LAUNCHES = {"gluon": launch_gluon, "paged": launch_paged}


def prepared(way: Way, batch: Batch) -> Callable[[], torch.Tensor]:
    """A call that computes a batch's attention [T, H, D]."""
    if way.kind != "sdpa":
        kernel, args, grid, options = LAUNCHES[way.kind](batch, **way.options)

        def run() -> torch.Tensor:
            kernel[grid](*args, **options)
            return batch.out

        return run
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, str(way.options["backend"]))
    count = len(batch.shape)
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (batch.q, batch.k, batch.v))

    def library() -> torch.Tensor:
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
        return out.transpose(1, 2).flatten(0, 1)

    return library


def measure(name: str) -> Iterator[Line]:
    """A way's largest error and its time, for each shape."""
    way = WAYS[name]
    for label, shape in SHAPES.items():
        if way.kind == "sdpa" and len(set(shape)) + (shape[0][0] != shape[0][1]) > 1:
            continue
        batches = [Batch(shape, 16, seed) for seed in range(COPIES)]
        calls = [prepared(way, batch) for batch in batches]
        errors = [batches[0].worst(calls[0]()) for _ in range(2)]
        us = us_of(calls, max(2, 8192 // len(batches[0].q)))
        yield {"shape": label, "error": max(errors), "us": us}


def compile_only(name: str) -> None:
    """Compiles a way for the device into Triton's cache; launches nothing."""
    way = WAYS[name]
    used = [used_by(LAUNCHES[way.kind](Batch(s, 16, 0), **way.options)) for s in SHAPES.values()]
    print(f"compiled {name:28s} {used[-1]}", flush=True)


def table(lines: Sequence[Line]) -> None:
    """Prints what was measured: for each shape the times, and each way's largest error."""
    times = {(x["name"], x["shape"]): float(str(x["us"])) for x in lines if "us" in x}
    flops = {
        label: 4 * D * H * sum(t * s - t * (t - 1) / 2 for t, s in shape)
        for label, shape in SHAPES.items()
    }
    print(f"\n{'µs (TFLOP/s)':22s}" + "".join(f"|{label:>14s} " for label in SHAPES) + "| error")
    for name in WAYS:
        row = f"{name:22s}"
        for label in SHAPES:
            us = times.get((name, label))
            cell = f"{us:8.1f} ({flops[label] / us / 1e6:3.0f})" if us else ""
            row += f"|{cell:>14s} "
        errors = [float(str(x["error"])) for x in lines if x["name"] == name and "us" in x]
        failed = [str(x["failed"]) for x in lines if x["name"] == name and "failed" in x]
        print(f"{row}| {max(errors, default=0):.1e} {' '.join(failed)}")


def main() -> None:
    """Compiles side by side, measures in turn, prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", nargs="*")
    parser.add_argument("--compile")
    options = parser.parse_args()
    triton.set_allocator(_scratch)
    if options.measure:
        say(options.measure, measure)
        return
    if options.compile:
        compile_only(options.compile)
        return
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    compile_all(__file__, [name for name, way in WAYS.items() if way.kind != "sdpa"], 60)
    table(measured(__file__, list(WAYS)))


if __name__ == "__main__":
    main()

"""Decode linears on a GPU: the 8B shape's products with their norms and epilogues, variant by
variant, beside cuBLAS's product alone.

    python benchmarks/bench_linear.py [--tokens 1,8,32,64] [--shapes qkv,o,gate_up,down,lm_head]
        [--chain] [--defaults] [-o lines.jsonl]

Each line is the time of one launch in a CUDA graph over copies of the weights that together are
several times the L2, and the bytes of the weights over it as a share of the measured read rate.
Every variant is held against float64 first. ``--chain`` times the four of a layer, layer by layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import graph_timing
import torch
import torch.nn.functional as F
from graph_timing import read_rate, seconds_of

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.linear import linear_source
from tilewright.codegen.triton.kernels.linear_tiles import (
    GemmTiles,
    GemvTiles,
    Problem,
    default_gemm,
    default_gemv,
    shared_bytes,
)
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.layout import dense
from tilewright.codegen.triton.package import KernelPackage
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import evaluate, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType
from tilewright.ir.widen import widened
from tilewright.targets import TARGETS

B = symbol("B")
TARGET = TARGETS["h100"]
ROTATED_BYTES = 400e6  # copies of a weight that are read in turn: many times the L2's 50 MB
LAYER = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Shape:
    """A product of a decode step: [T, k] times [n * parts, k], norm before, residual behind."""

    k: int
    n: int
    norm: bool = False
    parts: int = 1
    residual: bool = False

    @property
    def nbytes(self) -> int:
        """Of the weights, in bfloat16."""
        return 2 * self.k * self.n * self.parts


SHAPES = {
    "qkv": Shape(4096, 6144, norm=True),
    "o": Shape(4096, 4096, residual=True),
    "gate_up": Shape(4096, 14336, norm=True, parts=2),
    "down": Shape(14336, 4096, residual=True),
    "lm_head": Shape(4096, 128256, norm=True),
    "qkv_1b": Shape(2048, 3072, norm=True),
    "o_1b": Shape(2048, 2048, residual=True),
    "gate_up_1b": Shape(2048, 8192, norm=True, parts=2),
    "down_1b": Shape(8192, 2048, residual=True),
    "lm_head_1b": Shape(2048, 128256, norm=True),
    # What one of 8 devices has of a 70B shape. The sums of o and down are parts, which all devices'
    # are added to before the residual is.
    "qkv_70b_8": Shape(8192, 1280, norm=True),
    "o_70b_8": Shape(1024, 8192),
    "gate_up_70b_8": Shape(8192, 3584, norm=True, parts=2),
    "down_70b_8": Shape(3584, 8192),
    "lm_head_70b_8": Shape(8192, 16032, norm=True),
}


def node_of(shape: Shape) -> Node:
    """The ``fused`` node that the passes make of it."""
    x = input_node("x", TensorType(DType.BF16, (B, shape.k)))
    weight = input_node("weight", TensorType(DType.BF16, (shape.n * shape.parts, shape.k)))
    inputs, value = [x], x
    if shape.norm:
        scale = input_node("scale", TensorType(DType.BF16, (shape.k,)))
        inputs.append(scale)
        value = make("rms_norm", x, scale, eps=1e-5)
    inputs.append(weight)
    value = make("linear", value, weight, None)
    if shape.parts == 2:
        gate, up = (
            make("slice", value, dim=1, start=s, step=1, stop=s + shape.n) for s in (0, shape.n)
        )
        value = make("gated", gate, up, activation="silu")
    if shape.residual:
        inputs.append(input_node("residual", TensorType(DType.BF16, (B, shape.n))))
        value = make("add", inputs[-1], value)
    body = Graph("linear", tuple(inputs), (value,))
    outer = [input_node(f"outer_{i}", node.type) for i, node in enumerate(inputs)]
    return make("fused", *outer, body=body, kind="linear")


def problem_of(shape: Shape) -> Problem:
    """What the templates see."""
    node = node_of(shape)
    found = Problem.of(node, tuple(dense(operand.shape) for operand in node.operands))
    assert found is not None
    return found


def variants(shape: Shape, tokens: int) -> Iterator[tuple[str, KernelSource]]:
    """Labelled sources: the default first."""
    problem, parts = problem_of(shape), shape.parts
    for tiles in dict.fromkeys(_tiles(problem, tokens)):
        single = isinstance(tiles, GemvTiles)
        source = linear_source(
            problem, TARGET, tiles if single else None, [] if single else [tiles]
        )
        assert source is not None
        values = ",".join(str(int(value)) for value in asdict(tiles).values())
        yield f"{'gemv' if single else 'gemm'}({values})x{parts}", source


def _tiles(problem: Problem, tokens: int) -> Iterator[GemvTiles | GemmTiles]:
    block_m = next(m for m in (16, 32, 64, 128) if tokens <= m or m == 128)
    parts = problem.parts
    default = default_gemm(problem, TARGET, block_m)
    assert default is not None
    if tokens == 1:
        yield default_gemv(problem, TARGET)
        for rows, block_k, warps in (
            (2, 2048, 8), (4, 2048, 8), (8, 2048, 8), (4, 1024, 4), (8, 1024, 4), (4, 4096, 8),
            (4, 4096, 16), (8, 4096, 16), (2, 1024, 4), (8, 512, 4), (16, 512, 4),
        ):  # fmt: skip
            yield GemvTiles(max(rows // parts, 1), block_k, warps)
        yield default
        return
    yield default
    for rows, block_k, warps, stages, splits in product(
        (32, 64, 128), (64, 128, 256), (2, 4, 8), (2, 3, 4, 5, 6, 8), (1, 2, 4)
    ):
        tiles = GemmTiles(block_m, rows // parts, block_k, warps, stages, splits)
        if _is_sensible(problem, tiles, rows):
            yield tiles


_STAGES = {64: (3, 4, 6, 8), 128: (2, 3, 4, 5), 256: (2, 3)}


def _is_sensible(problem: Problem, tiles: GemmTiles, rows: int) -> bool:
    """Whether a cut is worth its time: enough on the way, no warps without work, few parts."""
    stage = tiles.block_k * (rows + tiles.block_m) * 2
    programs = -(-problem.n // tiles.block_n) * tiles.splits
    return (
        tiles.has_work(problem.k)
        and shared_bytes(problem, tiles) < 227 << 10
        and stage * tiles.num_stages >= 32 << 10
        and tiles.num_warps * 16 <= rows * tiles.block_m // 16
        and (rows == 128) >= (tiles.num_warps == 8)
        and (rows > 32 or tiles.block_m <= 32)
        and tiles.num_stages in _STAGES[tiles.block_k]
        and (tiles.splits == 1 or programs <= 4 * TARGET.sms)
        and problem.k // tiles.block_k // tiles.splits >= 2
    )


class Contest:
    """One shape at one number of tokens: inputs, copies of the weights, and what they give."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        self.shape, self.tokens, self.node = shape, tokens, node_of(shape)
        generator = torch.Generator("cuda").manual_seed(0)
        body = self.node.attr("body")
        assert isinstance(body, Graph)
        self.operands = []
        for node in body.inputs:
            sizes = [evaluate(size, {"B": tokens}) for size in node.shape]
            value = torch.randn(sizes, generator=generator, device="cuda")
            scale = shape.k**-0.5 if node.shape[0] == shape.n * shape.parts else 1.0
            self.operands.append((value * scale).bfloat16())
        wide = [operand.double() for operand in self.operands]
        self.expected = interpret(widened(body, DType.F64), wide)[0]
        self.weight_at = 1 + shape.norm
        count = max(2, min(64, int(ROTATED_BYTES / shape.nbytes)))
        self.weights = [self.operands[self.weight_at].clone() for _ in range(count)]

    def kernel(self, package: KernelPackage) -> Callable[[int], torch.Tensor]:
        """A call over the copy of that number."""
        launched = LaunchedKernel(package, self.node.types, (), torch.device("cuda"))
        sizes = {"B": self.tokens}

        def run(index: int) -> torch.Tensor:
            operands = list(self.operands)
            operands[self.weight_at] = self.weights[index % len(self.weights)]
            return launched(operands, sizes)[0]

        return run

    def cublas(self, index: int) -> torch.Tensor:
        """The product alone."""
        return F.linear(self.operands[0], self.weights[index % len(self.weights)])

    def error(self, found: torch.Tensor) -> float:
        """Largest deviation from float64, relative to the largest magnitude."""
        deviation = (found.double() - self.expected).abs().max()
        return float(deviation / self.expected.abs().max())


def chain(output: Path | None, rate: float, tokens: int, layers: int = 8) -> None:
    """The four products of a layer, one behind the other, layer by layer, in one graph."""
    contests = {name: Contest(SHAPES[name], tokens) for name in LAYER}
    sources = {name: next(variants(SHAPES[name], tokens))[1] for name in LAYER}
    packages = compile_sources(list(sources.values()), TARGET.arch)
    runs = {n: contests[n].kernel(p) for n, p in zip(LAYER, packages, strict=True)}
    nbytes = sum(SHAPES[name].nbytes for name in LAYER)
    for label, calls in (
        ("ours", [runs[name] for name in LAYER]),
        ("cublas", [contests[name].cublas for name in LAYER]),
    ):
        seconds = seconds_of(lambda i, calls=calls: [call(i) for call in calls], layers)
        report(output, "chain", tokens, label, seconds, nbytes, rate, None)


def report(
    output: Path | None,
    shape: str,
    tokens: int,
    label: str,
    seconds: float,
    nbytes: int,
    rate: float,
    error: float | None,
) -> None:
    """Prints a line, and appends it."""
    share = nbytes / seconds / rate
    text = "" if error is None else f"  error {error:.1e}"
    record = {
        "shape": shape,
        "tokens": tokens,
        "variant": label,
        "us": seconds * 1e6,
        "share_of_read": share,
        "error": error,
    }
    line = f"{shape:10} T={tokens:<3} {label:34} {seconds * 1e6:8.2f} us {share:6.3f}{text}"
    graph_timing.report(record, line, output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="1,8,32,64")
    parser.add_argument("--shapes", default="qkv,o,gate_up,down,lm_head")
    parser.add_argument("--chain", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--defaults", action="store_true", help="Only what the engine takes.")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    counts = [int(word) for word in options.tokens.split(",")]
    names = options.shapes.split(",")
    labelled = {
        (name, tokens): list(variants(SHAPES[name], tokens)) for name in names for tokens in counts
    }
    if options.defaults:
        labelled = {key: found[:1] for key, found in labelled.items()}
    flat = [source for found in labelled.values() for _, source in found]
    packages = iter(compile_sources(flat, TARGET.arch))
    if options.compile_only:
        print(f"{len(flat)} variants compiled")
        return
    rate = read_rate()
    print(f"{torch.cuda.get_device_name()}, read {rate / 1e9:.0f} GB/s")
    if options.chain:
        for tokens in counts:
            chain(options.output, rate, tokens)
    for (name, tokens), found in labelled.items():
        contest = Contest(SHAPES[name], tokens)
        launches = max(len(contest.weights), 8)
        nbytes = SHAPES[name].nbytes
        seconds = seconds_of(contest.cublas, launches)
        report(options.output, name, tokens, "cublas", seconds, nbytes, rate, None)
        for (label, _), package in zip(found, packages, strict=False):  # one iterator for all
            try:
                run = contest.kernel(package)
                error = contest.error(run(0))
                seconds = seconds_of(run, launches)
            except Exception as failure:  # one bad variant does not end the contest
                print(f"{name} T={tokens} {label}: {type(failure).__name__}: {str(failure)[:200]}")
                continue
            report(options.output, name, tokens, label, seconds, nbytes, rate, error)
        del contest
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

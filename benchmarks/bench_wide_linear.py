"""Linears of many tokens on a GPU: ours with their norms and epilogues, cut by cut, beside cuBLAS's
product alone, and beside cuBLAS with what is around it as generated kernels.

    python benchmarks/bench_tma_linear.py [--tokens 512,2048,8192] [--shapes qkv,o,gate_up,down]
        [--special] [--compile-only] [-o lines.jsonl]

Random data. Every cut is held against float64 before it is timed: calls in a CUDA graph, between
events, over copies of the weights that together are several times the L2. The table at the end has
the fastest cut of each shape, and the times of cuBLAS over its own: alone, and with all that ours
does. Libraries are timed before and after ours, and count with the better of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_linear import SHAPES, TARGET, Contest, Shape, problem_of
from graph_timing import report, seconds_of

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.generate import emit_fused
from tilewright.codegen.triton.kernels.tma_linear import tma_linear_source
from tilewright.codegen.triton.kernels.tma_linear_tiles import TmaTiles
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.package import KernelPackage
from tilewright.codegen.triton.source import KernelSource
from tilewright.codegen.triton.unfused import unfused
from tilewright.errors import UnsupportedError
from tilewright.ir.node import Node

ERROR = 2e-2  # of the largest magnitude: bfloat16, rounded a few times
CUTS = (  # tokens, rows of weights, columns of a step, group, warps, stages, strips, flat, special
    (256, 128, 64, 8, 8, 4, 1, True),
    (256, 128, 64, 8, 8, 3, 1, True),
    (256, 128, 64, 8, 8, 4, 1, False),
    (128, 256, 64, 8, 8, 4, 1, True),
    (128, 256, 64, 8, 8, 3, 1, True),
    (128, 256, 64, 16, 8, 4, 1, True),
    (128, 256, 64, 8, 8, 4, 2, False),
    (128, 128, 64, 8, 4, 4, 1, True),
    (128, 128, 64, 8, 8, 5, 1, True),
    (128, 128, 128, 8, 8, 3, 1, True),
)
SPECIAL = (  # with warps that only load: apart, for a kernel that hangs ends the run
    (128, 256, 64, 8, 4, 3, 1, False, True),
    (128, 256, 64, 8, 4, 3, 2, False, True),
    (128, 256, 64, 8, 4, 4, 1, False, True),
    (256, 128, 64, 8, 4, 3, 2, False, True),
    (128, 128, 64, 8, 4, 4, 1, False, True),
)


def cuts(shape: Shape, special: bool) -> Iterator[tuple[str, KernelSource]]:
    """Labelled sources of the cuts that fit."""
    for block_m, rows, *rest in SPECIAL if special else CUTS:
        tiles = TmaTiles(block_m, rows // shape.parts, *rest)  # type: ignore[arg-type]
        source = tma_linear_source(problem_of(shape), TARGET, tiles)
        if source is not None:
            yield ",".join(str(int(value)) for value in astuple(tiles)), source


def separate(contest: Contest) -> Callable[[int], torch.Tensor]:
    """The norm, cuBLAS's product and the epilogue one by one, the others by generated kernels."""
    found = unfused(contest.node, TARGET)
    assert found is not None, "libraries take bfloat16"
    parts = [node for _, node in found.parts]
    fused = [part for part in parts if part.op == "fused"]
    sources = [emit_fused(p, tuple(located(o)[1] for o in p.operands), TARGET) for p in fused]
    packages = compile_sources([source for source in sources if source is not None], TARGET.arch)
    assert len(packages) == len(fused), "what is unfused has generated kernels"
    kernels = {
        part: LaunchedKernel(package, part.types, (), torch.device("cuda"))
        for part, package in zip(fused, packages, strict=True)
    }

    def run(index: int) -> torch.Tensor:
        values: dict[Node, torch.Tensor] = dict(
            zip(contest.node.operands, contest.operands, strict=True)
        )
        weight = contest.node.operands[contest.weight_at]
        values[weight] = contest.weights[index % len(contest.weights)]
        for part in parts:
            operands = [values[operand] for operand in part.operands]
            values[part] = (
                kernels[part](operands, {"B": contest.tokens})[0]
                if part in kernels
                else F.linear(*operands)
            )
        return values[parts[-1]]

    return run


def compiled(
    name: str, found: Sequence[tuple[str, KernelSource]]
) -> list[tuple[str, KernelPackage]]:
    """The cuts that the installed Triton compiles; others are named."""
    try:
        packages = compile_sources([source for _, source in found], TARGET.arch)
        return [(label, package) for (label, _), package in zip(found, packages, strict=True)]
    except UnsupportedError as error:
        if len(found) == 1:
            print(f"{name} {found[0][0]}: {error}"[:300], flush=True)
            return []
        return [one for pair in found for one in compiled(name, [pair])]


def contend(
    name: str, tokens: int, kernels: Sequence[tuple[str, KernelPackage]], output: Path | None
) -> str:
    """Times a shape by everything; the line of the table."""
    contest = Contest(SHAPES[name], tokens)
    calls = max(len(contest.weights), 8)
    around = separate(contest)
    assert contest.error(around(0)) < ERROR, "the libraries' own result"
    libraries = [[seconds_of(contest.cublas, calls), seconds_of(around, calls)]]
    best, chosen = float("inf"), "none"
    for label, package in kernels:
        try:
            run = contest.kernel(package)
            error = contest.error(run(0))
            if error > ERROR:
                print(f"{name} T={tokens} {label}: WRONG, error {error:.1e}", flush=True)
                continue
            seconds = seconds_of(run, calls)
        except Exception as failure:  # one bad cut does not end the contest
            print(f"{name} T={tokens} {label}: {failure}"[:300], flush=True)
            continue
        rate = 2 * tokens * contest.weights[0].numel() / seconds
        record = {"shape": name, "tokens": tokens, "cut": label, "us": seconds * 1e6}
        text = f"{name:8} T={tokens:<5} {label:26} {seconds * 1e6:9.1f} us {rate / 1e12:6.1f} TF/s"
        report({**record, "error": error}, f"{text}  error {error:.1e}", output)
        if seconds < best:
            best, chosen = seconds, label
    libraries.append([seconds_of(contest.cublas, calls), seconds_of(around, calls)])
    alone, whole = (min(pair) for pair in zip(*libraries, strict=True))
    times = f"{best * 1e6:9.1f} {alone * 1e6:9.1f} {whole * 1e6:9.1f}"
    record = {"shape": name, "tokens": tokens, "ours_us": best * 1e6, "cut": chosen}
    line = f"{name:8} {tokens:6} {times} {alone / best:7.3f} {whole / best:7.3f}  {chosen}"
    report({**record, "cublas_us": alone * 1e6, "separate_us": whole * 1e6}, line, output)
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="512,2048,8192")
    parser.add_argument("--shapes", default="qkv,o,gate_up,down")
    parser.add_argument("--special", action="store_true", help="Cuts with warps that only load.")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    names = options.shapes.split(",")
    labelled = {name: list(cuts(SHAPES[name], options.special)) for name in names}
    kernels = {name: compiled(name, found) for name, found in labelled.items()}
    if options.compile_only:
        print(f"{sum(map(len, kernels.values()))} cuts compiled")
        return
    print(torch.cuda.get_device_name(), flush=True)
    lines = [
        contend(name, int(tokens), kernels[name], options.output)
        for name in names
        for tokens in options.tokens.split(",")
    ]
    print("shape    tokens   ours us cuBLAS us with rest   alone    both  cut")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Decode products over quantized weights on a GPU: the 8B shape's, by scheme, against the time that
their bytes take to read.

    python benchmarks/bench_quant_linear.py [--tokens 1,8,32,64,128] [--shapes qkv,o,gate_up,down]
        [--schemes int4,w4a8,int8,fp8,w8a8,w8a8-int8,w8a8-block] [--compile-only] [-o lines.jsonl]

Each line is the time of a product with its norm and epilogue in a CUDA graph, over copies of the
weights that together are several times the L2, and the bytes of codes, scales and x over it as a
share of the measured read rate. Each is held against float64 of what the codes stand for first; of
"w8a8" x is rounded to codes too, and the library's product of codes alone stands beside. Of "w4a8"
the kernel may round x, and float64 has it as it was: that error is the scheme's.
``--compile-only`` needs no GPU: registers and spills of each launch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_linear import ROTATED_BYTES, SHAPES, TARGET, Shape, node_of
from graph_timing import read_rate, report, seconds_of

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.candidates import KERNELS
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.layout import dense
from tilewright.codegen.triton.package import KernelPackage
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.build import input_node, item, make
from tilewright.ir.dims import evaluate
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.interpreter import interpret
from tilewright.ir.node import Node
from tilewright.ir.ops.control import body_of
from tilewright.ir.ops.quant import blocks, packed_width
from tilewright.ir.types import TensorType
from tilewright.ir.widen import widened

LAYER = ("qkv", "o", "gate_up", "down")
WORST = 2e-2  # deviation, relative to the largest magnitude: bfloat16's results


@dataclass(frozen=True)
class Scheme:
    """Codes and their scales: by groups of columns, or by rows where ``group`` is 0; ``rounds``
    where x is rounded to such too, ``compute`` what the kernel may round it to.
    """

    codes: DType
    group: int
    scale: DType
    usual: float
    rows: int = 1
    rounds: bool = False
    compute: DType | None = None

    def shapes(self, rows: int, k: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the codes, and of the scales."""
        width = packed_width(k, self.group) if self.codes is DType.U8 else k
        return (rows, width), (blocks(rows, self.rows), blocks(k, self.group))


SCHEMES = {
    "int4": Scheme(DType.U8, 128, DType.BF16, 4.0),
    "w4a8": Scheme(DType.U8, 128, DType.BF16, 4.0, compute=DType.I8),
    "int8": Scheme(DType.I8, 0, DType.F32, 70.0),
    "fp8": Scheme(DType.F8E4M3, 0, DType.F32, 60.0),
    "w8a8": Scheme(DType.F8E4M3, 0, DType.F32, 60.0, rounds=True),
    "w8a8-int8": Scheme(DType.I8, 0, DType.F32, 70.0, rounds=True),
    "w8a8-block": Scheme(DType.F8E4M3, 128, DType.F32, 60.0, 128, rounds=True),
}


def quant_node(shape: Shape, scheme: Scheme) -> Node:
    """The ``fused`` node of bench_linear.py with its weight dequantized."""
    plain = body_of(node_of(shape))
    codes, scales = scheme.shapes(shape.n * shape.parts, shape.k)
    parts = [
        input_node("codes", TensorType(scheme.codes, codes)),
        input_node("scales", TensorType(scheme.scale, scales)),
    ]
    values, inputs = dict[Node, Node](), list[Node]()
    for node in plain.nodes:
        if node.op == "input" and node.attr("name") == "weight":
            width = shape.k if scheme.codes is DType.U8 else None
            attrs = {"dtype": DType.BF16, "rows": scheme.rows, "group": scheme.group}
            may = {"width": width, "compute": scheme.compute}
            values[node] = make("dequantize", *parts, None, **attrs, **may)
            inputs += parts
        elif node.op == "input":
            values[node] = node
            inputs.append(node)
        else:
            args = [None if arg is None else values[arg] for arg in node.args]
            if node.op == "linear" and scheme.rounds:
                rows = make("quantize_rows", args[0], dtype=scheme.codes, group=scheme.group)
                args = [item(rows, 0), item(rows, 1), *parts, None]
                values[node] = make("scaled_linear", *args, **attrs)
            else:
                values[node] = make(node.op, *args, **dict(node.attrs))
    body = Graph("quant_linear", tuple(inputs), (values[plain.outputs[0]],))
    outer = [input_node(f"outer_{i}", node.type) for i, node in enumerate(inputs)]
    return make("fused", *outer, body=body, kind="linear")


def source_of(node: Node) -> KernelSource:
    """The default kernel."""
    layouts = tuple(dense(o.shape) for o in node.operands)
    found = (emit(node, layouts, TARGET) for emit in KERNELS["fused"])
    return next(source for source in found if source is not None)


class Contest:
    """One product at one number of tokens: operands, copies of its codes, and what it gives."""

    def __init__(self, shape: Shape, scheme: Scheme, tokens: int) -> None:
        self.shape, self.tokens, self.node = shape, tokens, quant_node(shape, scheme)
        generator = torch.Generator("cuda").manual_seed(0)
        given = {"generator": generator, "device": "cuda"}
        self.operands = []
        for node in body_of(self.node).inputs:
            sizes = [evaluate(size, {"B": tokens}) for size in node.shape]
            if node.attr("name") == "codes":
                value = _codes(scheme, sizes, generator)
            elif node.attr("name") == "scales":
                value = (torch.rand(sizes, **given) + 0.5) * shape.k**-0.5 / scheme.usual
            else:
                value = torch.randn(sizes, **given)
            self.operands.append(value.to(node.dtype.torch))
        self.at = 1 + shape.norm
        self.nbytes = sum(operand.nbytes for operand in self.operands)
        self.expected = self._expected()
        count = max(2, min(64, int(ROTATED_BYTES / self.operands[self.at].nbytes)))
        self.copies = [self.operands[self.at].clone() for _ in range(count)]

    def _expected(self) -> torch.Tensor:
        body = widened(body_of(self.node), DType.F64)
        wide = [o.to(n.dtype.torch) for o, n in zip(self.operands, body.inputs, strict=True)]
        return interpret(body, wide)[0]

    def library_seconds(self) -> float:
        """Of cuBLASLt's product of codes [T, K] alone, a scale a row, without what is around it."""
        x = torch.randn(self.tokens, self.shape.k, device="cuda").to(torch.float8_e4m3fn)
        ones = [torch.ones(n, 1, device="cuda") for n in (self.tokens, len(self.copies[0]))]

        def run(index: int) -> torch.Tensor:
            weight = self.copies[index % len(self.copies)].t()
            return torch._scaled_mm(x, weight, ones[0], ones[1].t(), out_dtype=torch.bfloat16)

        return seconds_of(run, max(len(self.copies), 8))

    def error(self, found: torch.Tensor) -> float:
        """Largest deviation from float64, relative to the largest magnitude."""
        deviation = (found.double() - self.expected).abs().max()
        return float(deviation / self.expected.abs().max())

    def seconds(self, package: KernelPackage) -> tuple[float, float]:
        """(seconds of a call, error)."""
        launched = LaunchedKernel(package, self.node.types, (), torch.device("cuda"))

        def run(index: int) -> torch.Tensor:
            operands = list(self.operands)
            operands[self.at] = self.copies[index % len(self.copies)]
            return launched(operands, {"B": self.tokens})[0]

        error = self.error(run(0))
        return seconds_of(run, max(len(self.copies), 8)), error


def _codes(scheme: Scheme, sizes: list[int], generator: torch.Generator) -> torch.Tensor:
    if scheme.codes is DType.F8E4M3:
        return torch.randn(sizes, generator=generator, device="cuda") * scheme.usual
    low, high = (0, 256) if scheme.codes is DType.U8 else (-127, 128)
    return torch.randint(low, high, sizes, generator=generator, device="cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line; exit code 1 where a result is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="1,8,32,64,128")
    parser.add_argument("--shapes", default=",".join(LAYER))
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    pairs = [(s, n) for n in options.shapes.split(",") for s in options.schemes.split(",")]
    nodes = [quant_node(SHAPES[name], SCHEMES[scheme]) for scheme, name in pairs]
    packages = compile_sources([source_of(node) for node in nodes], TARGET.arch)
    if options.compile_only:
        for (scheme, name), package in zip(pairs, packages, strict=True):
            found = ", ".join(f"{r.registers}/{r.spills}" for r in package.resources)
            print(f"{name:8} {scheme:10} registers/spills {found}")
        return 0
    rate, wrong = read_rate(), 0
    print(f"{torch.cuda.get_device_name()}, read {rate / 1e9:.0f} GB/s")
    for (scheme, name), package in zip(pairs, packages, strict=True):
        for tokens in map(int, options.tokens.split(",")):
            contest = Contest(SHAPES[name], SCHEMES[scheme], tokens)
            seconds, error = contest.seconds(package)
            share = contest.nbytes / seconds / rate
            record = {"shape": name, "scheme": scheme, "tokens": tokens, "us": seconds * 1e6}
            record |= {"share_of_read": share, "error": error}
            text = f"{name:8} {scheme:10} T={tokens:<3} {seconds * 1e6:8.2f} us {share:6.3f}"
            if scheme == "w8a8":
                record["library_us"] = contest.library_seconds() * 1e6
                text += f"  library {record['library_us']:8.2f} us"
            report(record, f"{text}  error {error:.1e}", options.output)
            wrong += error > WORST
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

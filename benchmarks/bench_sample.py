"""sample on a GPU: greedy rows and random ones under every cut, against the memory's rate.

    python benchmarks/bench_sample.py [--rows 1,8,32,128] [--modes greedy,top_k] [--all] [-o FILE]

A vocabulary of 128256 in bfloat16, probabilities that fall with a power of the rank, as a language
model's do; ``--flat`` takes nearly equal ones. Calls go over copies of the logits, larger than L2
together. The floor is one read of the logits. Tokens are held against the op's reference in float64
first; exit code 1 if one is wrong. ``--all`` times the whole search space, else the default alone;
``--list`` names what would be timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from graph_timing import read_rate, report, seconds_of

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.sample import (
    SPACE,
    Problem,
    Tiles,
    default_tiles,
    sample_source,
)
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.package import KernelPackage
from tilewright.codegen.triton.source import has_pdl
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS, Target

VOCAB = 128_256
COLD_BYTES = 200_000_000  # of the copies that calls take in turn: four times the H100's L2
LEAST_CALLS = 24
EPSILON = 1e-5  # what sums in float32 may be off, of the whole (kernels/sample.py)
OP = schema("sample")
# temperature, top_k, top_p, min_p
MODES: Mapping[str, tuple[float, int, float, float]] = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top_k": (0.8, 50, 1.0, 0.0),
    "top_p": (0.8, 0, 0.9, 0.0),
    "min_p": (0.8, 0, 1.0, 0.05),
    "all": (0.8, 50, 0.9, 0.05),
}


def sample_node() -> Node:
    """The call, over the symbol R."""
    R = symbol("R")
    names = OP.operands[1:]
    types = (DType.I32 if name == "top_k" else DType.F32 for name in names)
    given = (input_node(n, TensorType(t, (R,))) for n, t in zip(names, types, strict=True))
    return make("sample", input_node("logits", TensorType(DType.BF16, (R, VOCAB))), *given)


def problem_of(node: Node) -> Problem:
    """What the template sees."""
    found = Problem.of(node, tuple(located(arg)[1] for arg in node.operands))
    assert found is not None
    return found


def cuts(problem: Problem, whole: bool) -> list[Tiles]:
    """The default first, then all others if the ``whole`` space is wanted."""
    rest = itertools.product(*SPACE.values()) if whole else ()
    return list(dict.fromkeys([default_tiles(problem), *(Tiles(*values) for values in rest)]))


class Case:
    """Copies of the logits of so many rows, which all have the parameters of a mode."""

    def __init__(self, rows: int, flat: bool) -> None:
        self.rows = rows
        self.nbytes = rows * VOCAB * 2
        self.generator = torch.Generator("cuda").manual_seed(0)
        copies = max(2, -(-COLD_BYTES // self.nbytes))
        noise = torch.randn(
            copies, rows, VOCAB, generator=self.generator, device="cuda", dtype=torch.bfloat16
        )
        if flat:
            self.logits = noise
            return
        # The token of rank r has a logit near -1.2 log r: the likeliest one has a fifth of all.
        ranks = torch.randperm(VOCAB, generator=self.generator, device="cuda") + 1
        self.logits = noise.mul_(0.3).sub_((1.2 * ranks.log()).bfloat16())

    @property
    def calls(self) -> int:
        """Of a graph: over each copy once, or several times."""
        return len(self.logits) * -(-LEAST_CALLS // len(self.logits))

    def parameters(self, mode: str) -> list[torch.Tensor]:
        """Of each row, uniform random numbers included."""
        values = MODES[mode]
        types = (torch.float32, torch.int32, torch.float32, torch.float32)
        found = [
            torch.full((self.rows,), value, dtype=dtype, device="cuda")
            for value, dtype in zip(values, types, strict=True)
        ]
        uniform = torch.rand(self.rows, generator=self.generator, device="cuda")
        return [*found, uniform]

    def wrong(self, found: torch.Tensor, parameters: Sequence[torch.Tensor]) -> int:
        """Rows of the first copy whose token is none that float64 gives, with the sums that top-p
        compares and that the token inverts off by EPSILON.
        """
        logits = self.logits[0].double()
        temperature, top_k, top_p, min_p, uniform = parameters
        if not float(temperature[0]) > 0:
            wanted = OP.reference(logits, *parameters)
            assert isinstance(wanted, torch.Tensor)
            return int((found != wanted).sum())
        edges = []
        for p_off, u_off in itertools.product((-EPSILON, 0.0, EPSILON), repeat=2):
            moved = torch.where(top_p < 1, top_p + p_off, top_p)
            at = (uniform + u_off).clamp(0, 1 - 2**-24)
            edges.append(OP.reference(logits, temperature, top_k, moved, min_p, at))
        stacked = torch.stack(edges)
        inside = (stacked.amin(0) <= found) & (found <= stacked.amax(0))
        return int((~inside).sum())


def timed(
    case: Case,
    mode: str,
    tiles: Tiles,
    package: KernelPackage,
    rate: float,
    out: Path | None,
) -> bool:
    """Measures a cut on a case, unless it is wrong; whether it is right."""
    from tilewright.codegen.triton.launch import LaunchedKernel

    kernel = LaunchedKernel(package, sample_node().types, (), torch.device("cuda", 0))
    parameters, sizes = case.parameters(mode), {"R": case.rows}
    wrong = case.wrong(kernel([case.logits[0], *parameters], sizes)[0], parameters)
    seconds = float("nan")
    if not wrong:
        count = len(case.logits)
        seconds = seconds_of(
            lambda index: kernel([case.logits[index % count], *parameters], sizes), case.calls
        )
    share = case.nbytes / seconds / rate
    record = {
        "kernel": "sample",
        "rows": case.rows,
        "mode": mode,
        "tiles": asdict(tiles),
        "microseconds": seconds * 1e6,
        "share_of_read": share,
        "registers": [r.registers for r in package.resources],
        "wrong_rows": wrong,
    }
    name = "c{chunk} b{block} w{num_warps} s{num_stages}".format(**asdict(tiles))
    text = f"R{case.rows:<4} {mode:12} {name:22} {seconds * 1e6:8.2f} us {share:6.3f} "
    report(record, text + f"wrong {wrong}", out)
    return not wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, and prints a line a mode and cut."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,8,32,128")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    target = TARGETS["h100"] if options.list else Target.detect()
    problem = problem_of(sample_node())
    tried = cuts(problem, options.all)
    sources = [sample_source(problem, tiles, has_pdl(target)) for tiles in tried]
    if options.list:
        for tiles, source in zip(tried, sources, strict=True):
            print(tiles, source.digest[:8])
        return 0
    packages = compile_sources(sources, target.arch)
    rate = read_rate()
    print(f"{torch.cuda.get_device_name()}, read {rate / 1e9:.0f} GB/s")
    wrong = 0
    for rows in map(int, options.rows.split(",")):
        case = Case(rows, options.flat)
        for mode in options.modes.split(","):
            for tiles, package in zip(tried, packages, strict=True):
                wrong += not timed(case, mode, tiles, package, rate, options.output)
        del case
        torch.cuda.empty_cache()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Products of 512 tokens in clusters: neighbours along M share each tile of weights, which one
TMA brings to all of them (multicast), where each would read its own out of L2.

    python benchmarks/gpu/trial_cluster_gemm.py --compile FOLDER     # Triton 3.7 or later, no GPU
    python benchmarks/gpu/trial_cluster_gemm.py FOLDER               # any Triton, an sm_90 device

Triton 3.6 has no words for that, so machine code travels: the first command writes it, the second
one loads it, holds the results against float64 (one that is off is not timed), and times them
beside cuBLAS by replays of a graph over rotated buffers; what hangs is killed. A way is
ROWSxCOLUMNSxCLUSTER: of a multiprocessor's tile, and how many share.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from trials import Line, measured, say, us_of

from tilewright.codegen.triton.launch import LoadedFunction, cuda_driver, enter_context
from tilewright.codegen.triton.package import Binary, Resources
from tilewright.codegen.triton.tensor_map import Mapped
from tilewright.codegen.triton.worker import ptx_parameters

TOKENS, COPIES = 512, 4
SHAPES = {  # of weights, of an 8B model's layer
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
LINE, WARPS = 64, 8
LIBRARY = "cuBLAS"
ROUNDING = 0.03  # of bfloat16, and of another order: six deviations are rounded by 0.016 at most


@dataclass(frozen=True)
class Way:
    """A cut: rows and columns of a multiprocessor's tile, those that share weights, and stages."""

    rows: int
    columns: int
    ctas: int
    stages: int

    @property
    def parts(self) -> tuple[int, int]:
        """Columns as one or two powers of two."""
        most = 1 << (self.columns.bit_length() - 1)
        return most, self.columns - most


WAYS = {
    f"{way.rows}x{way.columns}x{way.ctas}": way
    for way in (
        Way(128, 128, 2, 6),
        Way(128, 128, 4, 6),
        Way(128, 192, 2, 5),
        Way(128, 192, 4, 5),
        Way(128, 256, 2, 4),
        Way(128, 256, 4, 4),
        Way(256, 128, 2, 4),
    )
}


def compile_way(way: Way) -> tuple[bytes, dict[str, object]]:
    """A way's machine code for sm_90, and what its launch has to know."""
    import triton
    from cluster_gemm_kernel import _product  # which Triton 3.6 cannot read
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier

    count = way.ctas.bit_length() - 1
    along = [[1 << i, 0] for i in range(count)]
    most, more = way.parts
    lines = gl.NVMMASharedLayout(128, 16, rank=2, cga_layout=along)
    alike = gl.NVMMASharedLayout(128, 16, rank=2, cga_layout=[[0, 0]] * count)

    def sums(columns: int) -> object:
        return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, columns, 16], along)

    boxes = {"a_desc": (way.rows * way.ctas, lines), "b_desc": (most, alike)}
    boxes["c_desc"] = (more or most, alike)
    signature = {n: f"tensordesc<bf16[{r}, {LINE}],{s!r}>" for n, (r, s) in boxes.items()}
    signature |= {"out": "*bf16", "width": "i32", "steps": "i32"}
    constants = {
        "STAGES": way.stages,
        "CTAS": way.ctas,
        "MORE": more > 0,
        "OWN": mbarrier.MBarrierLayout([[1 << i] for i in range(count)]),
        "ALL": mbarrier.MBarrierLayout([[0]] * count),
        "SUMS": sums(most),
        "SUMS_MORE": sums(more or most),
    }
    source = GluonASTSource(_product, signature | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": WARPS, "num_ctas": way.ctas}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    facts: dict[str, object] = {
        "entry": made.metadata.name,
        "shared": made.metadata.shared,
        "threads": made.metadata.num_warps * 32,
        "parameters": ptx_parameters(made.asm["ptx"], made.metadata.name),
    }
    return made.asm["cubin"], facts


def loaded(folder: Path, name: str, device: torch.device) -> LoadedFunction:
    """A way's function, which is launched in clusters."""
    facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    resources = Resources(0, 0, 0, int(facts["shared"]), int(facts["threads"]))
    code = (folder / f"{name}.cubin").read_bytes()
    ctas = WAYS[name].ctas
    binary = Binary(facts["entry"], 90, code, resources, tuple(facts["parameters"]), cluster=ctas)
    function = LoadedFunction.of(binary, device)
    driver = cuda_driver()
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size = attribute.value.clusterDim
    size.x, size.y, size.z = ctas, 1, 1
    function.config.attrs, function.config.numAttrs = [attribute], 1
    return function


def launcher(
    function: LoadedFunction, way: Way, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
) -> Callable[[], None]:
    """A call of x [T, K] times weight [N, K], into out [T, N]."""

    def described(tensor: torch.Tensor, rows: int) -> Mapped:
        return Mapped(tensor, 0, tuple(tensor.shape), (tensor.shape[1], 1), (rows, LINE))

    most, more = way.parts
    maps = (described(x, way.rows), described(weight, most), described(weight, more or most))
    n, k = weight.shape
    grid = (len(x) // way.rows, n // way.columns, 1)

    def run() -> None:
        values = [v for one in maps for v in one.values(lambda: enter_context(x.device))]
        function(grid, [*values, out.data_ptr(), n, k // LINE])

    return run


class Product:
    """A shape's buffers, which calls rotate over, and what the first ones come to.

    Attributes:
        x: bf16 [T, K] each; weights: bf16 [N, K]; outs: bf16 [T, N].
    """

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        random = torch.Generator(device).manual_seed(0)

        def drawn(rows: int) -> list[torch.Tensor]:
            made = [torch.randn(rows, k, generator=random, device=device) for _ in range(COPIES)]
            return [one.bfloat16() for one in made]

        self.x, self.weights = drawn(TOKENS), drawn(n)
        self.outs = [torch.full((TOKENS, n), torch.nan, device=device).bfloat16() for _ in self.x]

    def calls(self, name: str, function: LoadedFunction | None) -> list[Callable[[], object]]:
        """A way's calls; cuBLAS' without a function."""
        buffers = list(zip(self.x, self.weights, self.outs, strict=True))
        if function is None:
            return [partial(torch.mm, x, weight.T, out=out) for x, weight, out in buffers]
        return [launcher(function, WAYS[name], x, weight, out) for x, weight, out in buffers]

    def error(self) -> float:
        """The largest one of the first result, in standard deviations of it."""
        wanted = self.x[0].double() @ self.weights[0].double().T
        return float((self.outs[0].double() - wanted).abs().max() / wanted.std())


def measure(folder: Path, name: str) -> Iterator[Line]:
    """A way's largest error and its time, for each shape that it divides."""
    device = torch.device("cuda", torch.cuda.current_device())
    function = None if name == LIBRARY else loaded(folder, name, device)
    for shape, (n, k) in SHAPES.items():
        if function is not None:
            way = WAYS[name]
            if TOKENS % (way.rows * way.ctas) or n % way.columns:
                continue
        product = Product(n, k, device)
        calls = product.calls(name, function)
        calls[0]()
        error = product.error()
        if not error < ROUNDING:
            raise ValueError(f"{shape}: {error:.2g} std off")
        yield {"shape": shape, "error": error, "us": us_of(calls, 8)}


def table(lines: Sequence[Line]) -> None:
    """Prints each way's times, and how many of them cuBLAS' rate is."""
    times = {(x["name"], x["shape"]): float(str(x["us"])) for x in lines if "us" in x}
    print(f"{'us, of cuBLAS':14s}" + "".join(f"|{shape:>15s} " for shape in SHAPES))
    for name in (LIBRARY, *WAYS):
        row = f"{name:14s}"
        for shape in SHAPES:
            us, library = times.get((name, shape)), times.get((LIBRARY, shape), math.nan)
            of_library = "" if us is None else f"{us:.1f} {library / us:.3f}"
            row += f"|{of_library:>15s} "
        failed = [str(x["failed"]) for x in lines if x["name"] == name and "failed" in x]
        print(row + "".join(failed))


def main() -> None:
    """Compiles, or measures what was compiled."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--measure", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        say(options.measure, partial(measure, options.folder))
        return
    if not options.compile:
        table(measured(__file__, [LIBRARY, *WAYS], [str(options.folder)]))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, way in WAYS.items():
        code, facts = compile_way(way)
        (options.folder / f"{name}.cubin").write_bytes(code)
        (options.folder / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")
        print(f"{name:12s} {facts['shared']} B shared, {len(code)} B of code", flush=True)


if __name__ == "__main__":
    main()

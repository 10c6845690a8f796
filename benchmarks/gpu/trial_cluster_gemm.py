"""Products of 512 tokens in clusters: neighbours along M share each tile of weights, which one
TMA brings to all of them (multicast), where each would read its own out of L2.

    python benchmarks/gpu/trial_cluster_gemm.py --compile FOLDER     # Triton 3.7 or later, no GPU
    python benchmarks/gpu/trial_cluster_gemm.py FOLDER               # any Triton, an sm_90 device

Triton 3.6 has no words for that, so machine code travels: the first command writes it, the second
one loads it, holds the results against float64, and times them beside cuBLAS by replays of a graph
over rotated buffers. A way is ROWSxCOLUMNSxCLUSTER: of a multiprocessor's tile, and how many share.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from trials import us_of

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
    from cluster_gemm import product  # which Triton 3.6 cannot read
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
    source = GluonASTSource(product, signature | dict.fromkeys(constants, "constexpr"), constants)
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


def measure(folder: Path, device: torch.device) -> None:
    """Each way's largest error and its time, for each shape it divides, beside cuBLAS."""
    functions = {
        name: loaded(folder, name, device) for name in WAYS if (folder / f"{name}.json").is_file()
    }
    for label, (n, k) in SHAPES.items():
        random = torch.Generator(device).manual_seed(0)
        made = [
            [torch.randn(s, k, generator=random, device=device).bfloat16() for s in (TOKENS, n)]
            for _ in range(COPIES)
        ]
        outs = [torch.empty(TOKENS, n, device=device, dtype=torch.bfloat16) for _ in range(COPIES)]
        x, weight = made[0]
        truth = (x[:64].double() @ weight.double().T).cpu()
        pairs = list(zip(made, outs, strict=True))
        own = [lambda x=x, w=w, out=out: torch.mm(x, w.T, out=out) for (x, w), out in pairs]
        library = us_of(own, 8)
        print(f"{label:8s} cuBLAS {library:7.1f} us", flush=True)
        for name, function in functions.items():
            way = WAYS[name]
            if TOKENS % (way.rows * way.ctas) or n % way.columns:
                continue
            calls = [launcher(function, way, x, w, out) for (x, w), out in pairs]
            outs[0].fill_(float("nan"))
            calls[0]()
            error = (outs[0][:64].double().cpu() - truth).abs().max() / truth.std()
            rest = float((outs[0] - x @ weight.T).abs().max())
            us = us_of(calls, 8)
            print(
                f"{label:8s} {name:12s} {us:7.1f} us  {library / us:.3f} of cuBLAS' rate, off "
                f"{float(error):.1e} std, {rest:.2g} from cuBLAS",
                flush=True,
            )


def main() -> None:
    """Compiles, or measures what was compiled."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if not options.compile:
        measure(options.folder, torch.device("cuda", torch.cuda.current_device()))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, way in WAYS.items():
        code, facts = compile_way(way)
        (options.folder / f"{name}.cubin").write_bytes(code)
        (options.folder / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")
        print(f"{name:12s} {facts['shared']} B shared, {len(code)} B of code", flush=True)


if __name__ == "__main__":
    main()

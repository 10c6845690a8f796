"""Mixtures of experts on a GPU: our kernels beside transformers' implementations, compiled.

    python benchmarks/bench_experts.py [--layers mixtral,qwen3_moe] [--tokens 1,32,512,4096]
                                       [--rivals grouped_mm,batched_mm] [--json FILE]
    python benchmarks/bench_experts.py --sweep gate_up --layers mixtral --tokens 32

The experts of one layer in bfloat16, tokens that choose at random. Each computes the same inputs,
in CUDA graphs of several calls, whose inputs are drawn anew. Rivals are `torch.compile`d for each
number of tokens; one that fails, or would need more memory than there is, is named with the reason.
What is timed is first held against float64, on the first tokens: exit code 1 if ours is further
from it than torch's own bfloat16. The floor is one read of the weights that are chosen, or the
products at the rate of a large one, whichever takes longer. ``--sweep`` times other tiles of one
product in the place of the default's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from graph_timing import read_rate, seconds_of

from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.experts import experts_source
from tilewright.codegen.triton.kernels.experts_tiles import (
    SPACE,
    GroupTiles,
    Problem,
    Product,
    RowTiles,
    buckets,
    default_rows,
    most_row_tokens,
    shared_bytes,
)
from tilewright.codegen.triton.kernels.wide_experts_tiles import SPACE as WIDE_SPACE
from tilewright.codegen.triton.kernels.wide_experts_tiles import (
    WideTiles,
    default_tiles,
    takes_tiles,
)
from tilewright.codegen.triton.launch import LaunchedKernel
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.package import KernelPackage
from tilewright.codegen.triton.source import KernelSource
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.targets import Target

LAYERS: Mapping[str, tuple[int, int, int, int]] = {  # E, k, K, F
    "mixtral": (8, 2, 4096, 14336),
    "qwen3_moe": (128, 8, 2048, 768),
}
RIVALS = ("grouped_mm", "batched_mm")
INPUTS = 8  # that calls take in turn
CHECKED = 48  # tokens that are held against float64
SLACK = 1.05  # of torch's own error
OP = schema("moe_experts")
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Cut = RowTiles | GroupTiles


@dataclass(frozen=True)
class Layer:
    """The experts of one layer on the GPU.

    Attributes:
        name: of the table.
        module: transformers', whose weights all share.
        node: our call, over the symbol T.
        problem: what our kernels see.
    """

    name: str
    module: Any
    node: Node
    problem: Problem

    @classmethod
    def of(cls, name: str) -> Layer:
        """A layer of the table, its weights drawn at random."""
        experts, slots, width, inner = LAYERS[name]
        node = experts_node(experts, slots, width, inner)
        problem = Problem.of(node, tuple(None if a is None else located(a)[1] for a in node.args))
        assert problem is not None
        return cls(name, _module(experts, width, inner), node, problem)

    @property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [E, 2F, K], down [E, K, F]."""
        return self.module.gate_up_proj.detach(), self.module.down_proj.detach()

    def inputs(self, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """x [T, K], ids i64[T, k], weights [T, k], so many times."""
        generator = torch.Generator("cuda").manual_seed(tokens)
        p, found = self.problem, []
        for _ in range(INPUTS):
            x = torch.randn(tokens, p.width, generator=generator, device="cuda")
            router = torch.randn(tokens, p.experts, generator=generator, device="cuda")
            weights, ids = router.softmax(-1).topk(p.slots)
            found.append((x.bfloat16(), ids, (weights / weights.sum(-1, keepdim=True)).bfloat16()))
        return found


def experts_node(experts: int, slots: int, width: int, inner: int) -> Node:
    """The call in bfloat16, over the symbol T."""
    t, dtype = symbol("T"), DType.BF16
    x = input_node("x", TensorType(dtype, (t, width)))
    ids = input_node("ids", TensorType(DType.I64, (t, slots)))
    weights = input_node("weights", TensorType(dtype, (t, slots)))
    gate_up = input_node("gate_up", TensorType(dtype, (experts, 2 * inner, width)))
    down = input_node("down", TensorType(dtype, (experts, width, inner)))
    return make("moe_experts", x, ids, weights, gate_up, down, None, None, activation="silu")


def _module(experts: int, width: int, inner: int) -> Any:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = SimpleNamespace(
        num_experts=experts,
        hidden_size=width,
        moe_intermediate_size=inner,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config).bfloat16()
    module = module.to_empty(device="cuda").requires_grad_(False)
    for weight in module.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5)
    return module


def our_source(layer: Layer, target: Target, swept: Mapping[Product, Cut]) -> KernelSource:
    """Our kernel with the default tiles, but for those that are swept: one variant's alone."""
    p = layer.problem
    rows = tuple(swept.get(x, default_rows(p, x)) for x in ("gate_up", "down"))
    if any(isinstance(cut, RowTiles) for cut in swept.values()):
        return experts_source(p, target, rows, ())  # type: ignore[arg-type]
    groups = []
    for block_m, most in buckets(p, None):
        groups.append((default_tiles(p, target, block_m), most))
    for product, cut in swept.items():
        place = 0 if product == "gate_up" else 1
        (tiles,) = [tiles for tiles, _ in groups if tiles[0].block_m == cut.block_m]
        tiles = tuple(cut if index == place else one for index, one in enumerate(tiles))
        groups = [(tiles, None)]
    return experts_source(p, target, None if swept else rows, groups)  # type: ignore[arg-type]


def ours(layer: Layer, package: KernelPackage) -> Run:
    """A call of our kernel."""
    kernel = LaunchedKernel(package, layer.node.types, (), torch.device("cuda", 0))
    gate_up, down = layer.weights

    def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        operands = [x, ids, weights, gate_up, down, None, None]
        return kernel(operands, {"T": len(x)})[0]

    return run


def rival(layer: Layer, name: str, tokens: int) -> Run:
    """transformers' implementation of this name, compiled; MemoryError where its copies of weights
    would not fit.
    """
    p = layer.problem
    if name == "batched_mm":
        need = tokens * p.slots * 3 * p.inner * p.width * 2
        free = torch.cuda.mem_get_info()[0]
        if need > free // 2:
            raise MemoryError(f"copies {need / 1e9:.0f} GB of weights, {free / 1e9:.0f} are free")
    torch._dynamo.reset()
    layer.module.config._experts_implementation = name
    compiled = torch.compile(layer.module, dynamic=False)

    def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found = compiled(x, ids, weights)
        assert isinstance(found, torch.Tensor)
        return found

    return run


class Case:
    """A layer and a number of tokens."""

    def __init__(self, layer: Layer, tokens: int, rates: tuple[float, float]) -> None:
        self.layer, self.tokens = layer, tokens
        self.inputs = layer.inputs(tokens)
        x, ids, weights = (one[:CHECKED] for one in self.inputs[0])
        gate_up, down = layer.weights
        attrs = dict(layer.node.attrs)
        narrow = OP.reference(x, ids, weights, gate_up, down, None, None, **attrs)
        self.truth = self._truth(x, ids, weights)
        assert isinstance(narrow, torch.Tensor)
        self.torchs = self.error(narrow)
        self.floor = self._floor(*rates)

    def _truth(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """float64's result, an expert's weights at a time."""
        total = torch.zeros_like(x, dtype=torch.float64)
        attrs = dict(self.layer.node.attrs)
        for expert in ids.unique().tolist():
            gate_up, down = (w[expert : expert + 1].double() for w in self.layer.weights)
            share = weights.double() * (ids == expert)
            zeros = torch.zeros_like(ids)
            part = OP.reference(x.double(), zeros, share, gate_up, down, None, None, **attrs)
            assert isinstance(part, torch.Tensor)
            total += part
        return total

    def error(self, found: torch.Tensor) -> float:
        """Of the first tokens, relative to the truth's norm."""
        part = found[:CHECKED].double()
        return float((part - self.truth).norm() / self.truth.norm())

    def _floor(self, read: float, products: float) -> float:
        p = self.layer.problem
        used = sum(len(ids.unique()) for _, ids, _ in self.inputs) / len(self.inputs)
        elements = 3 * p.inner * p.width
        flops = 2 * self.tokens * p.slots * elements
        return max(used * elements * 2 / read, flops / products)

    def seconds(self, run: Run) -> float:
        """Of a call."""
        calls = INPUTS if self.tokens < 1024 else INPUTS // 2
        return seconds_of(lambda index: run(*self.inputs[index % INPUTS]), calls)


def product_rate() -> float:
    """FLOPs a second of a large product in bfloat16."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda _: a @ b, 4)


def measured(case: Case, name: str, make_run: Callable[[], Run]) -> dict[str, Any]:
    """The record of one implementation: seconds and error, or why there are none."""
    record: dict[str, Any] = {"layer": case.layer.name, "tokens": case.tokens, "by": name}
    try:
        run = make_run()
        record["error"] = case.error(run(*case.inputs[0]))
        record["microseconds"] = case.seconds(run) * 1e6
    except Exception as error:  # a rival that fails is no reason to measure nothing
        if name == "ours":
            raise
        record["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return record


def line(case: Case, records: Sequence[Mapping[str, Any]]) -> str:
    """One row of the table."""
    mine = records[0]["microseconds"]
    text = f"{case.layer.name:10} T{case.tokens:<5} floor {case.floor * 1e6:9.1f} us"
    text += f"  ours {mine:9.1f} us, {case.floor * 1e6 / mine:5.1%} of it"
    for record in records[1:]:
        if "failed" in record:
            text += f"  {record['by']} -"
        else:
            text += f"  {record['by']} {record['microseconds']:9.1f} us"
            text += f" ({record['microseconds'] / mine:.2f}x)"
    failed = [f"\n    {r['by']}: {r['failed']}" for r in records if "failed" in r]
    return text + "".join(failed)


def other_cuts(layer: Layer, product: Product, target: Target, tokens: int) -> list[Cut]:
    """The default for so many tokens, and what differs from it in at most two fields."""
    p = layer.problem
    if tokens <= most_row_tokens(p):
        default: Cut = default_rows(p, product)
    else:
        block_m = next(m for m, most in buckets(p, None) if most is None or tokens <= most)
        both = default_tiles(p, target, block_m)
        assert both is not None
        default = both[0 if product == "gate_up" else 1]
    space = WIDE_SPACE if isinstance(default, WideTiles) else SPACE
    # The order of pairs is one for both products.
    names = [n for n in space if hasattr(default, n) and n not in ("block_m", "group")]
    others = (
        replace(default, **dict(zip(some, values, strict=True)))
        for some in itertools.combinations(names, 2)
        for values in itertools.product(*(space[name] for name in some))
    )
    return [
        cut
        for cut in dict.fromkeys([default, *others])
        if _is_sound(p, product, cut, default, target)
    ]


def _is_sound(p: Problem, product: Product, cut: Cut, default: Cut, target: Target) -> bool:
    if isinstance(cut, RowTiles):
        threads = cut.block_n * cut.block_k / (32 * cut.num_warps)
        return cut.block_n <= 8 and cut.block_k >= 256 and 8 <= threads <= 128
    assert isinstance(default, GroupTiles)
    if isinstance(cut, WideTiles):
        return takes_tiles(p, product, cut, target)
    fits = shared_bytes(p, product, cut) <= target.shared_memory_per_block
    near = 0.5 <= cut.block_n * cut.block_k / (default.block_n * default.block_k) <= 2
    sums = cut.block_n * cut.block_m * (2 if product == "gate_up" else 1) / (32 * cut.num_warps)
    return fits and near and cut.block_n >= 16 and cut.num_stages >= 2 and sums <= 128


def sweep(case: Case, product: Product, target: Target) -> list[dict[str, Any]]:
    """Times of the whole layer with each of the other tiles of one product, the fastest last."""
    cuts = other_cuts(case.layer, product, target, case.tokens)
    sources = [our_source(case.layer, target, {product: cut}) for cut in cuts]
    records = []
    for cut, package in zip(cuts, compile_sources(sources, target.arch), strict=True):
        if any(taken.spills for taken in package.resources):
            continue
        record = measured(case, "ours", partial(ours, case.layer, package))
        records.append({**record, "product": product, "tiles": asdict(cut)})
    records.sort(key=lambda record: -record["microseconds"])
    for record in records[-12:]:
        print(f"{record['microseconds']:9.1f} us  {record['tiles']}")
    default = next(r for r in records if r["tiles"] == asdict(cuts[0]))
    print(f"{default['microseconds']:9.1f} us  by default", flush=True)
    return records


def compared(case: Case, package: KernelPackage, rivals: Sequence[str]) -> list[dict[str, Any]]:
    """The records of ours and of each rival, and a line of them."""
    layer = case.layer
    records = [measured(case, "ours", partial(ours, layer, package))]
    records += [measured(case, r, partial(rival, layer, r, case.tokens)) for r in rivals]
    print(line(case, records), flush=True)
    for record in records:
        record |= {"floor": case.floor * 1e6, "torchs": case.torchs}
    if records[0]["error"] > SLACK * case.torchs:
        print(f"    ours is wrong: {records[0]['error']:.2e}, torch {case.torchs:.2e}")
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, and prints a line for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--tokens", default="1,32,512,4096")
    parser.add_argument("--rivals", default=",".join(RIVALS))
    parser.add_argument("--sweep", choices=("gate_up", "down"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    target = Target.detect()
    rates = read_rate(), product_rate()
    print(f"{torch.cuda.get_device_name()}, read {rates[0] / 1e9:.0f} GB/s, ", end="")
    print(f"products {rates[1] / 1e12:.0f} TFLOP/s", flush=True)
    every: list[dict[str, Any]] = []
    for name in options.layers.split(","):
        layer = Layer.of(name)
        (package,) = compile_sources([our_source(layer, target, {})], target.arch)
        for tokens in map(int, options.tokens.split(",")):
            case = Case(layer, tokens, rates)
            if options.sweep:
                every += sweep(case, options.sweep, target)
            else:
                every += compared(case, package, [r for r in options.rivals.split(",") if r])
        del layer, case
        torch.cuda.empty_cache()
    if options.json is not None:
        found = {"device": torch.cuda.get_device_name(), "rates": rates, "records": every}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    mine = [record for record in every if record["by"] == "ours" and "torchs" in record]
    return 1 if any(record["error"] > SLACK * record["torchs"] for record in mine) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Cascade attention on a GPU: sequences that share a prefix, with it and without.

    python benchmarks/bench_cascade.py layer -o cascade.jsonl
    python benchmarks/bench_cascade.py engine [MODEL] -o cascade.jsonl

"layer": one layer's attention, 32 query and 8 KV heads of 128 in bfloat16, for several groups and
cuts; calls go over several caches in turn, larger than L2 together, in one CUDA graph. Rows are
held against the op's reference in float64 before anything is timed.

"engine": whole decode steps of an engine with random weights (MODEL is a folder with a config.json,
by default of an 8B shape), by replays of the step's graph, beside what memory needs for the bytes
of both ways. The tokens of both, which may part where two logits are near, are counted first.
Steps are timed by groups whether that pays or not; a column says what the engine itself would do.

What stands in the output of a run before is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from graph_timing import read_rate, report, seconds_of

import tilewright as tw
from tilewright.codegen.triton.aot import compile_sources
from tilewright.codegen.triton.kernels.cascade import (
    Tiles,
    cascade_source,
    default_tiles,
    fits,
)
from tilewright.codegen.triton.kernels.paged_attention_tiles import Problem
from tilewright.codegen.triton.kernels.paged_decode import emit_paged_decode
from tilewright.codegen.triton.layout import located
from tilewright.codegen.triton.package import KernelPackage
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.node import Node
from tilewright.ir.schema import schema
from tilewright.ir.types import TensorType
from tilewright.runtime.batch import DecodeBatch
from tilewright.runtime.decode_graphs import DecodeGraphs, bucket_of
from tilewright.runtime.engine import CausalLMEngine
from tilewright.runtime.prefix_groups import find_groups
from tilewright.targets import Target

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
COPIES = 4
SHAPE_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# (sequences of each group, tokens that a group shares, tokens behind)
CASES = (
    ((64,), 8192, 128),
    ((32, 32), 8192, 128),
    ((16,), 8192, 128),
    ((4,), 8192, 128),
    ((64,), 1024, 128),
    ((64,), 256, 128),
    ((8,), 512, 128),
    ((2,), 1024, 128),
    ((2,) * 32, 2048, 128),
    ((64,), 1024, 1024),
    ((64,), 2048, 1024),
)
STEPS = ((64,), 8192, 128), ((32, 32), 8192, 128), ((16,), 8192, 128), ((64,), 1024, 128)
CUTS = (
    Tiles(128, 64, 8, 3),
    Tiles(64, 64, 4, 2, waves=2),
    Tiles(64, 64, 4, 2, waves=4),
    Tiles(64, 64, 8, 2, waves=2),
    Tiles(32, 64, 4, 3),
)
REPLAYS = 20
VERSIONS = count(1)  # of block tables


def attention(shares: bool) -> Node:
    """The call, over symbols B, M and N; with groups or without."""
    B, M, N = map(symbol, "BMN")

    def tensor(name: str, *shape: Size, dtype: DType = DType.BF16) -> Node:
        return input_node(name, TensorType(dtype, shape))

    tables = tensor("tables", B, M, dtype=DType.I32)
    if shares:
        names = ("group_rows", "group_ids", "shared_pages")
        groups = [tensor(name, B, dtype=DType.I32) for name in names]
        tables = make("share_pages", tables, *groups)
    q = tensor("q", B, HEADS, DIM)
    caches = [tensor(name, N, PAGE, KV_HEADS, DIM) for name in "kv"]
    lens = tensor("lens", B, dtype=DType.I32)
    return make("paged_attention", q, *caches, tables, lens, scale=DIM**-0.5)


def packages(target: Target) -> dict[str, KernelPackage]:
    """By name: the plain kernel, and cascade kernels of all cuts that fit."""
    plain, node = attention(shares=False), attention(shares=True)
    layouts = tuple(None if arg is None else located(arg)[1] for arg in node.args)
    problem = Problem.of(node, layouts)
    assert problem is not None
    default = default_tiles(problem, target)
    cuts = [t for t in dict.fromkeys((default, *CUTS)) if t is not None]
    sources = {"plain": emit_paged_decode(plain, layouts, target)}
    for t in cuts:
        name = f"m{t.block_m} n{t.block_n} w{t.num_warps} s{t.num_stages} x{t.waves}"
        name += " default" * (t == default)
        sources[name] = cascade_source(problem, t, target) if fits(problem, t, target) else None
    kept = {name: source for name, source in sources.items() if source is not None}
    return dict(zip(kept, compile_sources(list(kept.values()), target.arch), strict=True))


@dataclass
class Case:
    """Operands of a step: a table for each of the caches, which share a pool."""

    groups: Sequence[int]
    shared: int
    own: int

    def __post_init__(self) -> None:
        cuda = {"device": "cuda", "dtype": torch.int32}
        self.count, pages, own = sum(self.groups), self.shared // PAGE, self.own // PAGE
        self.width = pages + own + 8
        needed = COPIES * (len(self.groups) * pages + self.count * own)
        free = torch.randperm(needed, device="cuda", dtype=torch.int32)
        self.pools = [
            torch.randn(needed, PAGE, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
            for _ in "kv"
        ]
        self.tables, taken = [], 0
        for _ in range(COPIES):
            table = torch.zeros(self.count, self.width, **cuda)
            first = 0
            for members in self.groups:
                table[first : first + members, :pages] = free[taken : taken + pages]
                taken, first = taken + pages, first + members
            some = free[taken : taken + self.count * own]
            table[:, pages : pages + own] = some.view(self.count, own)
            taken += self.count * own
            self.tables.append(table)
        self.q = torch.randn(self.count, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        self.lens = torch.full((self.count,), self.shared + self.own - 3, **cuda)
        ids = [i + 1 for i, members in enumerate(self.groups) for _ in range(members)]
        self.arrays = [
            torch.arange(self.count, **cuda),
            torch.tensor(ids, **cuda),
            torch.full((self.count,), pages, **cuda),
        ]
        self.sizes = {"B": self.count, "M": self.width, "N": needed}

    def operands(self, copy: int, shares: bool) -> list[torch.Tensor | None]:
        """Of a call on one of the caches."""
        head = [self.q, *self.pools, self.tables[copy % COPIES], self.lens, None]
        return [*head, *self.arrays] if shares else [*head, None, None, None]

    def error(self, found: torch.Tensor) -> float:
        """The largest error of some rows of the first cache over what the op's tolerance allows."""
        op, rows = schema("paged_attention"), [0, self.count // 2, self.count - 1]
        table = self.tables[0][rows]
        ids = table.flatten().long()
        caches = [pool[ids].double() for pool in self.pools]
        own = torch.arange(table.numel(), device="cuda").view_as(table)
        wanted = op.reference(
            self.q[rows].double(), *caches, own, self.lens[rows], None, scale=DIM**-0.5
        )
        assert isinstance(wanted, torch.Tensor)
        relative, absolute = op.tolerance[DType.BF16]
        off = (found[rows].double() - wanted).abs() / (absolute + relative * wanted.abs())
        return float(off.nan_to_num(torch.inf).max())


def layer(output: Path | None) -> int:
    """Every case with every cut; 1 if one is wrong."""
    from tilewright.codegen.triton.launch import LaunchedKernel

    kernels = {
        name: LaunchedKernel(package, attention(False).types, (), torch.device("cuda", 0))
        for name, package in packages(Target.detect()).items()
    }
    wrong, known = 0, _known(output)
    for groups, shared, own in CASES:
        case, times = Case(groups, shared, own), {}
        for name, kernel in kernels.items():
            facts = {"groups": list(groups), "shared": shared, "own": own, "variant": name}
            record = _found(known, facts)
            if record is None:
                calls = [case.operands(copy, name != "plain") for copy in range(COPIES)]
                error, seconds = case.error(kernel(calls[0], case.sizes)[0]), float("nan")
                if error <= 1.0:

                    def run(index: int, kernel=kernel, calls=calls, case=case) -> None:  # noqa: ANN001
                        kernel(calls[index % COPIES], case.sizes)

                    seconds = seconds_of(run, 5 * COPIES)
                record = {**facts, "microseconds": seconds * 1e6, "error": error}
                wrong += not error <= 1.0
            times[name] = record["microseconds"]
            text = f"{_text(groups):8} share {shared:5}, own {own:4}  {name:28} {times[name]:8.1f}"
            text += f" us {times['plain'] / times[name]:6.2f}x error {record['error']:.2f}"
            report(record, text, None if record in known else output)
    return 1 if wrong else 0


def engine(model: Path, output: Path | None) -> int:
    """Whole steps of an engine; 1 where the two ways disagree on more than near ties."""
    steps, known = [], _known(output)
    for groups, shared, own in STEPS:
        facts = {"step": model.name, "groups": list(groups), "shared": shared, "own": own}
        if (record := _found(known, facts)) is None:
            steps.append((groups, shared, own, facts))
        else:
            report(record, _summary(record), None)
    if not steps:
        return 0
    longest = max(shared + own for _, shared, own, _ in steps)
    made = tw.compile(
        model,
        random_weights=0,
        dtype="bfloat16",
        max_model_len=longest + 256,
        max_batch_size=max(sum(groups) for groups, *_ in steps),
        verify="off",
    )
    assert isinstance(made, CausalLMEngine)
    for tensor in made.executor.caches.tensors.values():
        tensor.normal_()
    rate, wrong = read_rate(), 0
    for groups, shared, own, facts in steps:
        record = {**facts, **_step(made, groups, shared, own), "read": rate}
        report(record, _summary(record), output)
        wrong += record["same"] < 0.9 * sum(groups)
    return 1 if wrong else 0


def _step(made: CausalLMEngine, groups: Sequence[int], shared: int, own: int) -> dict[str, Any]:
    """Seconds of a step both ways, the bytes of each, and how many tokens are the same."""
    graphs, size, many = made.executor.graphs, made.pool.page_size, sum(groups)
    least = made.executor.capabilities.shared_tokens
    assert isinstance(graphs, DecodeGraphs) and least is not None
    first, behind = shared // size, -(-(own + 64) // size)
    tables = np.zeros((many, first + behind), np.int32)
    start, row = 1, 0
    for members in groups:
        tables[row : row + members, :first] = np.arange(start, start + first)
        start, row = start + first, row + members
    tables[:, first:] = start + np.arange(many * behind).reshape(many, behind)
    positions = [shared + own - 3] * many
    slots = [int(t[p // size]) * size + p % size for t, p in zip(tables, positions, strict=True)]
    ids = np.random.default_rng(0).integers(made.config.vocab_size, size=many).tolist()
    found = find_groups(tables, positions, size, -(1 << 40))
    assert found is not None
    greedy, tokens, times = [tw.SamplingParams()] * many, {}, {}
    version = next(VERSIONS)
    for name, told in (("plain", None), ("cascade", found)):
        batch = DecodeBatch(
            tuple(range(many)), ids, None, positions, slots, greedy, None, tables, version,
            groups=told,
        )  # fmt: skip
        tokens[name] = graphs.launch(batch, None).tokens()
        times[name] = _replayed(graphs, many, told is not None)
    same = sum(a == b for a, b in zip(tokens["plain"], tokens["cascade"], strict=True))
    runner = graphs.runner
    weights = runner.program.weights.items()
    read = [runner.constants[buffer] for buffer, name in weights if "embed_tokens" not in name]
    token, total = made.executor.bytes_per_token, sum(positions)
    return {
        **times,
        "same": same,
        "by itself": found.pay(total, least),
        "weights": sum(tensor.nbytes for tensor in read),
        "keys": total * token,
        "different keys": (total - found.saved) * token,
    }


def _replayed(graphs: DecodeGraphs, count: int, shared: bool) -> float:
    """Median seconds of a replay of the graph of the step before."""
    captured = (graphs.shared if shared else graphs.captured)[bucket_of(count)]
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        captured.graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return statistics.median(times)


def _summary(record: Mapping[str, Any]) -> str:
    plain, cascade, rate = record["plain"], record["cascade"], record["read"]
    needs = [record["weights"] + record[keys] for keys in ("keys", "different keys")]
    text = f"{_text(record['groups']):8} share {record['shared']:5}, own {record['own']:4}  "
    text += f"plain {plain * 1e3:6.2f} ms, cascade {cascade * 1e3:6.2f}: {plain / cascade:.2f}x; "
    text += "memory alone {:.2f} and {:.2f} ms; ".format(*(n / rate * 1e3 for n in needs))
    chosen = "by groups" if record["by itself"] else "not by groups"
    return text + f"{record['same']} tokens are the same; the engine runs it {chosen}"


def _text(groups: Sequence[int]) -> str:
    return "+".join(map(str, groups)) if len(groups) < 4 else f"{len(groups)}*{groups[0]}"


def _known(output: Path | None) -> list[dict[str, Any]]:
    """What runs before have measured on such a device."""
    if output is None or not output.exists():
        return []
    lines = output.read_text("utf-8").splitlines()
    device = torch.cuda.get_device_name()
    return [one for line in lines if (one := json.loads(line))["device"] == device]


def _found(known: Sequence[dict[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((one for one in known if facts.items() <= one.items()), None)


def main() -> int:
    """Runs a part; exit code 1 for a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["layer", "engine"])
    parser.add_argument("model", type=Path, nargs="?", help="a folder with a config.json")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.part == "layer":
        return layer(options.output)
    if options.model is not None:
        return engine(options.model, options.output)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "8b"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(SHAPE_8B), "utf-8")
        return engine(model, options.output)


if __name__ == "__main__":
    sys.exit(main())

"""Triton's own ``@triton.autotune`` over the same space, on a GPU: how long it takes, and how good
its choice is by the data of measure_spaces.py.

    python benchmarks/rival_autotune.py [--problem "down_1b T=128"] [--configs 60] [--json FILE]

The decorator compiles and times every config it is given, one after the other, and answers at the
end. It is given configs of the problem's own kernel, drawn evenly from those that share K among
programs (a function holds either those or the others), and runs them on warm operands, as it does
for everybody. The time for the whole space follows from that of those it ran.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from fit_prior import DATA, measured

from tilewright.autotune.space import Config
from tilewright.codegen.triton.source import PDL, KernelSource, Pointer, Scalar
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.ir.dims import evaluate


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="down_1b T=128")
    parser.add_argument("--configs", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    (problem,) = (p for p in measured(DATA) if p.name == options.problem)
    split = [
        c for c in problem.seconds if isinstance(s := dict(c.values).get("splits"), int) and s > 1
    ]
    step = max(1, len(split) // options.configs)
    configs = split[::step][: options.configs]
    seconds, best = autotuned(problem.tunable, configs)
    found = {
        "problem": problem.name,
        "configs": len(configs),
        "seconds": seconds,
        "seconds_for_all": seconds / len(configs) * len(problem.seconds),
        "loss": problem.seconds[best] / problem.best - 1,
        "loss_of_the_best_given": min(problem.seconds[c] for c in configs) / problem.best - 1,
        "config": best.to_json(),
    }
    print(json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps(found) + "\n", encoding="utf-8")


def autotuned(tunable: KernelTunable, configs: list[Config]) -> tuple[float, Config]:
    """Seconds that the decorator took, and its choice."""
    template, node, target = tunable.template, tunable.node, tunable.target
    made = {c: template.source(node, c, tunable.sizes, target) for c in configs}
    source = next(iter(made.values()))
    assert source is not None
    launch = source.variants[-1].launches[-1]
    sizes, device = tunable.sizes, torch.device("cuda")
    operands = tunable.template.operands(tunable.node, sizes, device, 0)
    spaces = [
        [evaluate(size, sizes) for _, size in s.variants[-1].workspaces]
        for s in made.values()
        if s is not None
    ]
    workspaces = [torch.empty(max(sizes), device=device) for sizes in zip(*spaces, strict=True)]
    counters = torch.zeros(1 << 16, dtype=torch.int32, device=device)
    results = [
        torch.empty([evaluate(n, sizes) for n in t.shape], dtype=t.dtype.torch, device=device)
        for t in tunable.node.types
    ]
    given: dict[str, Any] = {}
    for argument in launch.arguments:
        if isinstance(argument, Scalar):
            given[argument.name] = evaluate(argument.value, sizes)
        else:
            given[argument.name] = _tensor(argument, operands, results, workspaces, counters)
    chosen: dict[str, Config] = {}
    choices = []
    for config, one in made.items():
        assert one is not None
        wanted = one.variants[-1].launches[-1]
        choice = triton.Config(
            dict(wanted.constexprs) | {PDL: False},
            num_warps=wanted.num_warps,
            num_stages=wanted.num_stages,
        )
        chosen[str(choice)] = config
        choices.append(choice)
    with tempfile.TemporaryDirectory() as folder:
        function = getattr(_module(source, Path(folder)), launch.function)
        tuner = triton.autotune(configs=choices, key=["tokens"])(function)
        n = tunable.node.types[0].shape[-1]
        tokens = given["tokens"]
        started = time.monotonic()
        tuner[
            lambda meta: (
                triton.cdiv(n, meta["BLOCK_N"]),
                triton.cdiv(tokens, meta["BLOCK_M"]),
                meta["SPLITS"],
            )
        ](**given)
        torch.cuda.synchronize()
        return time.monotonic() - started, chosen[str(tuner.best_config)]


def _tensor(
    argument: Pointer,
    operands: Any,
    results: list[torch.Tensor],
    workspaces: list[torch.Tensor],
    counters: torch.Tensor,
) -> torch.Tensor:
    if argument.role == "counter":
        return counters
    from_where = {"operand": operands, "result": results, "workspace": workspaces}
    return from_where[argument.role][argument.index]


def _module(source: KernelSource, folder: Path) -> ModuleType:
    """The source as a module: Triton reads a function's text from its file."""
    path = folder / "rival.py"
    path.write_text(source.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("rival", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rival"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()

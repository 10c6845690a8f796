"""Products of many tokens on a GPU: ours with what stands behind them, cut by cut, beside cuBLAS's
product and a generated kernel for the rest.

    python benchmarks/bench_wide_linear.py [--tokens 512,2048,8192] [--forms o,gated,…]
        [--compile-only] [-o lines.jsonl]

Every cut is held against float64 before it is timed, by what the tuner times with
(codegen/triton/tuning/runner.py): calls in a CUDA graph over operands that are not in the L2. The
fastest are timed again in turns with the library. The table has the library's time over ours, and
the bar: 0.90, and 1.00 where something stands behind the product.

With ``-o`` it goes on where it was cut off. A cut that does not come back within ``SECONDS`` ends
the run, and is left out by the next one.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tilewright.autotune.space import Config
from tilewright.autotune.tunable import Ready
from tilewright.codegen.triton.kernels.wide_linear_tiles import WideTiles
from tilewright.codegen.triton.tuning.beside_library import is_library, library_config, of_ours
from tilewright.codegen.triton.tuning.problems import WIDE
from tilewright.codegen.triton.tuning.runner import KernelRunner
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.codegen.triton.tuning.wide_linear import config_of
from tilewright.ir.build import input_node, make
from tilewright.ir.dims import Size, symbol
from tilewright.ir.dtypes import DType
from tilewright.ir.graph import Graph
from tilewright.ir.node import Node
from tilewright.ir.types import TensorType
from tilewright.targets import TARGETS

T = symbol("T")
TARGET = TARGETS["h100"]
SECONDS = 60  # of one cut
ALONE, BEHIND = 0.90, 1.00  # bars
FINALISTS, ROUNDS = 3, 15
CUTS = (  # tokens, rows of weights, columns of a step, group, warps, stages, strips, shared, flat
    (128, 256, 64, 8, 8, 3, 1, False, True),
    (128, 256, 64, 8, 8, 3, 2, False, True),
    (128, 256, 64, 8, 8, 4, 2, False, True),
    (128, 256, 64, 16, 8, 4, 2, False, True),
    (256, 128, 64, 8, 8, 3, 2, False, True),
    (128, 128, 64, 8, 4, 4, 1, False, True),
    (128, 128, 64, 8, 8, 4, 1, False, True),
    (128, 256, 64, 8, 8, 3, 1, True, False),
    (128, 256, 64, 8, 8, 3, 2, True, False),
    (128, 256, 64, 8, 8, 4, 2, True, False),
    (256, 128, 64, 8, 8, 3, 2, True, False),
    (128, 128, 64, 8, 4, 4, 1, True, False),
)


@dataclass(frozen=True)
class Shape:
    """A product [T, k] times [n, k] of an 8B layer, and what stands behind it: nothing, "bias",
    "residual", "gelu" with a bias, or "gated", which halves n.
    """

    k: int
    n: int
    behind: str = ""


FORMS = {
    "qkv": Shape(4096, 6144),
    "qkv_bias": Shape(4096, 6144, "bias"),
    "o": Shape(4096, 4096),
    "o_residual": Shape(4096, 4096, "residual"),
    "gate_up": Shape(4096, 28672),
    "gated": Shape(4096, 28672, "gated"),
    "up_gelu": Shape(4096, 14336, "gelu"),
    "down": Shape(14336, 4096),
    "down_residual": Shape(14336, 4096, "residual"),
}


def node_of(shape: Shape) -> Node:
    """Product and rest as one ``fused`` node."""

    def tensor(name: str, *sizes: Size) -> Node:
        return input_node(name, TensorType(DType.BF16, sizes))

    inputs = [tensor("x", T, shape.k), tensor("weight", shape.n, shape.k)]
    bias = tensor("bias", shape.n) if shape.behind in ("bias", "gelu") else None
    inputs += [] if bias is None else [bias]
    value = make("linear", *inputs[:2], bias)
    if shape.behind == "residual":
        inputs.append(tensor("residual", T, shape.n))
        value = make("add", inputs[-1], value)
    elif shape.behind == "gelu":
        value = make("gelu", value)
    elif shape.behind == "gated":
        half = shape.n // 2
        ends = ((0, half), (half, shape.n))
        gate, up = (make("slice", value, dim=1, start=a, step=1, stop=b) for a, b in ends)
        value = make("gated", gate, up, activation="silu")
    outer = [input_node(f"outer_{i}", node.type) for i, node in enumerate(inputs)]
    return make("fused", *outer, body=Graph("product", tuple(inputs), (value,)), kind="linear")


def configs_of(tunable: KernelTunable, shape: Shape) -> list[Config]:
    """The library, and the cuts that the problem has."""
    found = [library_config(tunable.space)]
    for block_m, rows, *rest in CUTS:
        tiles = WideTiles(block_m, rows // (1 + (shape.behind == "gated")), *rest)  # type: ignore[arg-type]
        config = of_ours(config_of(tiles).as_dict())
        if tunable.space.contains(config):
            found.append(config)
    return found


def label_of(config: Config) -> str:
    """A config in a column of the table."""
    if is_library(config):
        return "library"
    values = list(config.as_dict().values())[1:]
    return ",".join(str(int(value)) for value in values)  # type: ignore[call-overload]


@dataclass
class Lines:
    """What was measured, a JSON object a line: by form, tokens and label."""

    path: Path | None
    known: dict[tuple[str, int, str], dict[str, Any]] = field(default_factory=dict)
    begun: set[tuple[str, int, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            for text in self.path.read_text("utf-8").splitlines():
                self._take(json.loads(text))

    def write(self, key: tuple[str, int, str], **values: Any) -> None:
        """Appends a line at once: what comes next may not come back."""
        line = {"form": key[0], "tokens": key[1], "cut": key[2], **values}
        self._take(line)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _take(self, line: dict[str, Any]) -> None:
        key = (line["form"], line["tokens"], line["cut"])
        self.begun.add(key)
        if "us" in line or "failed" in line:
            self.known[key] = line


def contend(
    name: str, tokens: int, tunable: KernelTunable, configs: Sequence[Config], lines: Lines
) -> None:
    """Times a form by the library and by each cut, then the fastest in turns."""
    if (name, tokens, "final library") in lines.known:
        return
    runner = KernelRunner(tunable.runner.spec)
    for config in configs:
        key = (name, tokens, label_of(config))
        if key in lines.begun:
            if key not in lines.known:
                lines.write(key, failed="did not come back")
            continue
        lines.write(key)
        signal.alarm(SECONDS)
        try:
            runner.prepare(config)
            error = runner.check(config)
            assert error <= 1, f"wrong: {error:.2f} of what is tolerated"
            seconds = statistics.median(runner.time(config, 5))
        except Exception as failure:  # one bad cut does not end the contest
            lines.write(key, failed=f"{type(failure).__name__}: {failure}"[:200])
        else:
            lines.write(key, us=seconds * 1e6, error=error)
        finally:
            signal.alarm(0)
    _final(name, tokens, runner, configs, lines)


def _final(
    name: str, tokens: int, runner: KernelRunner, configs: Sequence[Config], lines: Lines
) -> None:
    """The fastest cuts and the library, in turns."""
    times = {
        config: line["us"]
        for config in configs
        if "us" in (line := lines.known.get((name, tokens, label_of(config)), {}))
    }
    ours = sorted((c for c in times if not is_library(c)), key=times.__getitem__)[:FINALISTS]
    finalists = [*(c for c in times if is_library(c)), *ours]
    for config in finalists:
        if config not in runner.kernels:
            runner.prepare(config)
    found: dict[Config, list[float]] = {config: [] for config in finalists}
    for _ in range(ROUNDS):
        for config in finalists:
            found[config] += runner.time(config, 1)
    for config in reversed(finalists):  # the library's line says that all are there
        median = statistics.median(found[config])
        lines.write((name, tokens, f"final {label_of(config)}"), us=median * 1e6)


def table(cells: Sequence[tuple[str, int]], lines: Lines) -> Iterator[str]:
    """The fastest cut of each form, and the library's times over its own."""
    yield "form           tokens   ours us  TF/s  library us  ratio   bar   cut"
    for name, tokens in cells:
        final = {
            key[2].removeprefix("final "): line["us"]
            for key, line in lines.known.items()
            if key[:2] == (name, tokens) and key[2].startswith("final ")
        }
        library = final.pop("library", None)
        if library is None or not final:
            yield f"{name:14} {tokens:6}  nothing measured"
            continue
        cut = min(final, key=final.__getitem__)
        shape, ours = FORMS[name], final[cut]
        rate = 2e-6 * tokens * shape.n * shape.k / ours
        ratio, bar = library / ours, BEHIND if shape.behind else ALONE
        yield (
            f"{name:14} {tokens:6} {ours:9.1f} {rate:5.0f} {library:11.1f} {ratio:6.3f} "
            f"{bar:5.2f} {'  ' if ratio >= bar else ' -'} {cut}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="512,2048,8192")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    cells = [(n, int(t)) for n in options.forms.split(",") for t in options.tokens.split(",")]
    problems: dict[tuple[str, int], tuple[KernelTunable, list[Config]]] = {}
    prepared: dict[tuple[str, Config], object] = {}
    for name, tokens in cells:
        tunable = KernelTunable.of(WIDE, node_of(FORMS[name]), {"T": tokens}, TARGET)
        problems[name, tokens] = tunable, configs_of(tunable, FORMS[name])
    for name in dict.fromkeys(name for name, _ in cells):
        prepared |= compiled(name, [problems[cell] for cell in cells if cell[0] == name])
    if options.compile_only:
        print(f"{sum(isinstance(one, Ready) for one in prepared.values())} compiled")
        return
    print(torch.cuda.get_device_name(), flush=True)
    lines = Lines(options.output)
    for (name, tokens), (tunable, configs) in problems.items():
        ready = [c for c in configs if isinstance(prepared[name, c], Ready)]
        contend(name, tokens, tunable, ready, lines)
        print("\n".join(list(table([(name, tokens)], lines))[1:]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    print("\n".join(table(cells, lines)))


def compiled(
    name: str, problems: Sequence[tuple[KernelTunable, Sequence[Config]]]
) -> Mapping[tuple[str, Config], object]:
    """Whether each cut of a form is a kernel; those that are none are named."""
    tunable = problems[0][0]  # a kernel takes any number of tokens
    wanted = dict.fromkeys(config for _, configs in problems for config in configs)
    found = tunable.prepare(list(wanted))
    for config, one in found.items():
        if not isinstance(one, Ready):
            print(f"{name} {label_of(config)}: {one}"[:300], flush=True)
    return {(name, config): one for config, one in found.items()}


if __name__ == "__main__":
    main()

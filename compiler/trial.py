"""A Program of Triton kernels held against its graph without a GPU: a process of its own, since
Triton's interpreter has to be switched on before Triton is imported.

Run as ``python -m tilewright.compiler.trial FOLDER``: reads what `write_trial` wrote there, and
prints the largest relative error as JSON. Large weights' kernels run in part (spot_check.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from ..codegen.base import Kernel, Lowered
from ..codegen.eager.backend import is_call
from ..codegen.lowering import Buffers
from ..codegen.program import Call, Program
from ..codegen.triton.backend import OwnBytes
from ..codegen.triton.between import between_launches
from ..codegen.triton.hand_on import handed_values, hands_on, own_results
from ..codegen.triton.interpreted import SWITCH, InterpretedKernel
from ..errors import VerificationError
from ..ir.graph import Graph, param_name
from ..ir.interpreter import Value, interpret
from ..ir.node import Node
from ..ir.parser import parse_graph
from ..passes.engine_error import engine_error
from ..passes.sample_tokens import tokens_of
from ..runtime.runner import ProgramRunner
from .spot_check import LARGE, SpotCheckedKernel

PERIOD = 1_048_573  # a prime, so that no row of a large weight is like its neighbours
STD = 0.02


def program_error(graph: Graph, lowered: Lowered, cases: Sequence[Sequence[torch.Tensor]]) -> float:
    """The largest error of a Program, relative to the graph's interpreter.

    Args:
        graph: what the Program was made from.
        lowered: the Program and its kernels.
        cases: inputs of each run of it.

    Small weights (norms, tables) are the model's own; large ones are drawn, for a kernel computes
    the same of any numbers, and an embedding need not be copied.

    Raises:
        VerificationError: the Program computes something else, or cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="tilewright-") as name:
        write_trial(Path(name), graph, lowered, cases)
        environment = {**os.environ, SWITCH: "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
        command = [sys.executable, "-m", __name__, name]
        work = Path(name) / "work"  # empty, see aot.py
        work.mkdir()
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=work, check=False
        )
    if done.returncode == 0:
        return float(json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise VerificationError(
        f"the kernels of {graph.name}",
        expected="the numbers of the graph that they were made from",
        found=last[:500],
        remedy="Report it; backend='eager' has no kernels, verify='structure' no such check.",
    )


def write_trial(
    folder: Path, graph: Graph, lowered: Lowered, cases: Sequence[Sequence[torch.Tensor]]
) -> None:
    """Writes the graph, the Program, its kernels, the inputs and the small weights."""
    from safetensors.torch import save_file

    (folder / "graph.txt").write_text(str(graph), encoding="utf-8")
    (folder / "program.json").write_text(json.dumps(lowered.program.to_json()), encoding="utf-8")
    for name, content in lowered.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    dense = torch.contiguous_format  # safetensors takes no other, and none that share memory
    tensors = {
        f"input:{case}:{i}": x.clone(memory_format=dense)
        for case, inputs in enumerate(cases)
        for i, x in enumerate(inputs)
    }
    for node in graph.params:
        weight = graph.weights[param_name(node)]
        if torch.Size(weight.shape).numel() <= LARGE:
            tensors[f"weight:{param_name(node)}"] = weight.load().clone(memory_format=dense)
    save_file(tensors, folder / "tensors.safetensors")


def run_trial(folder: Path) -> float:
    """Runs a trial that `write_trial` wrote, in the interpreter."""
    from safetensors.torch import load_file

    graph = parse_graph((folder / "graph.txt").read_text(encoding="utf-8"))
    program = Program.from_json(json.loads((folder / "program.json").read_text(encoding="utf-8")))
    tensors = load_file(folder / "tensors.safetensors")
    weights = {
        name: tensors[f"weight:{name}"]
        if f"weight:{name}" in tensors
        else _drawn(node.shape, node.dtype.torch)
        for node in graph.params
        for name in (param_name(node),)
    }
    runner = ProgramRunner(program, weights, lambda name: OwnBytes((folder / name).read_bytes()))
    whole = list(runner.steps)
    worst = 0.0
    for case in range(len({name.split(":")[1] for name in tensors if name.startswith("input:")})):
        inputs = [tensors[f"input:{case}:{i}"] for i in range(len(graph.inputs))]
        values = _Values(graph, program, weights)
        with torch.no_grad():
            expected = interpret(graph, inputs, weights, values.take)
        runner.steps = [(call, values.spot_checked(call, kernel)) for call, kernel in whole]
        found = runner.run(dict(zip(program.inputs, (x.clone() for x in inputs), strict=True)))
        error = outputs_error("the Triton backend", graph, inputs, expected, found)
        worst = max(worst, error)
    return worst


class _Values:
    """The reference's values by the names of a Program's buffers."""

    def __init__(self, graph: Graph, program: Program, weights: Mapping[str, torch.Tensor]) -> None:
        self.buffers, self.program, self.weights = Buffers(graph), program, weights
        self.found: dict[str, torch.Tensor] = {}
        self.nodes: dict[str, Node] = {}
        self.ran: set[str] = set()

    def take(self, node: Node, value: Value) -> None:
        if is_call(node):
            values = value if isinstance(value, tuple) else (value,)
            names = self.buffers.of(node)
            self.found.update(zip(names, values, strict=True))
            self.nodes.update(dict.fromkeys(names, node))

    def spot_checked(self, call: Call, kernel: Kernel) -> Kernel:
        """A kernel that runs in part where there is much of it."""
        handed, own = None, own_results(call, call.results)
        if hands_on(call):
            weight = self.weights[self.program.weights[str(call.operands[-1])]]
            groups = int(str(self.program.buffers[call.results[-1]].shape[1]))
            handed = partial(handed_values, weight=weight, groups=groups)
        if not isinstance(kernel, InterpretedKernel) or not set(own) <= set(self.found):
            return kernel
        again = call.kernel in self.ran
        self.ran.add(call.kernel)
        between = between_launches(self.nodes[own[0]])
        return SpotCheckedKernel(kernel, [self.found[name] for name in own], handed, again, between)


def outputs_error(
    culprit: str,
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    found: Mapping[str, torch.Tensor],
) -> float:
    """The largest error of a Program's outputs against its graph's, as ``engine_error`` has it.

    Tokens are compared with what the graph draws from the Program's own logits: a rounding of
    these may move them.
    """
    wanted = dict(zip(graph.output_names, expected, strict=True))
    tokens = tokens_of(graph, inputs, found["logits"]) if "tokens" in wanted else None
    if tokens is not None:
        wanted["tokens"] = tokens
    return engine_error(culprit, graph, wanted, found)


def _drawn(shape: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
    sizes = [int(str(size)) for size in shape]
    count = torch.Size(sizes).numel()
    if not dtype.is_floating_point:
        return torch.zeros(sizes, dtype=dtype)
    generator = torch.Generator().manual_seed(count)
    base = (torch.randn(min(count, PERIOD), generator=generator) * STD).to(dtype)
    return base.repeat(-(-count // len(base)))[:count].view(sizes)


if __name__ == "__main__":
    print(json.dumps(run_trial(Path(sys.argv[1]))))

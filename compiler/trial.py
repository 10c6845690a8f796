"""A Program of Triton kernels held against its graph without a GPU: a process of its own, since
Triton's interpreter has to be switched on before Triton is imported.

Run as ``python -m tilewright.compiler.trial FOLDER``: reads what `write_trial` wrote there, and
prints the largest relative error as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..codegen.base import Lowered
from ..codegen.program import Program
from ..codegen.triton.backend import OwnBytes
from ..codegen.triton.interpreted import SWITCH
from ..errors import VerificationError
from ..ir.graph import Graph, param_name
from ..ir.interpreter import interpret
from ..ir.parser import parse_graph
from ..passes.driver import largest_error
from ..passes.sample_tokens import tokens_of
from ..runtime.runner import ProgramRunner

LARGE = 1 << 20  # elements; weights above are drawn there instead of being handed over
PERIOD = 1_048_573  # a prime, so that no row of a large weight is like its neighbours
STD = 0.02


def program_error(graph: Graph, lowered: Lowered, inputs: Sequence[torch.Tensor]) -> float:
    """The largest error of a Program, relative to the graph's interpreter.

    Small weights (norms, tables) are the model's own; large ones are drawn, for a kernel computes
    the same of any numbers, and an embedding need not be copied.

    Raises:
        VerificationError: the Program computes something else, or cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="tilewright-") as name:
        write_trial(Path(name), graph, lowered, inputs)
        environment = {**os.environ, SWITCH: "1"}
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
    folder: Path, graph: Graph, lowered: Lowered, inputs: Sequence[torch.Tensor]
) -> None:
    """Writes the graph, the Program, its kernels, the inputs and the small weights."""
    from safetensors.torch import save_file

    (folder / "graph.txt").write_text(str(graph), encoding="utf-8")
    (folder / "program.json").write_text(json.dumps(lowered.program.to_json()), encoding="utf-8")
    for name, content in lowered.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    dense = torch.contiguous_format  # safetensors takes no other, and none that share memory
    tensors = {f"input:{i}": x.clone(memory_format=dense) for i, x in enumerate(inputs)}
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
    inputs = [tensors[f"input:{i}"] for i in range(len(graph.inputs))]
    weights = {
        name: tensors[f"weight:{name}"]
        if f"weight:{name}" in tensors
        else _drawn(node.shape, node.dtype.torch)
        for node in graph.params
        for name in (param_name(node),)
    }
    with torch.no_grad():
        expected = interpret(graph, inputs, weights)
    runner = ProgramRunner(program, weights, lambda name: OwnBytes((folder / name).read_bytes()))
    found = runner.run(dict(zip(program.inputs, (x.clone() for x in inputs), strict=True)))
    return outputs_error("the Triton backend", graph, inputs, expected, found)


def outputs_error(
    culprit: str,
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    found: Mapping[str, torch.Tensor],
) -> float:
    """The largest error of a Program's outputs against its graph's, as ``largest_error`` has it.

    Tokens are compared with what the graph draws from the Program's own logits: a rounding of
    these may move them.
    """
    wanted = dict(zip(graph.output_names, expected, strict=True))
    tokens = tokens_of(graph, inputs, found["logits"]) if "tokens" in wanted else None
    if tokens is not None:
        wanted["tokens"] = tokens
    return largest_error(culprit, list(wanted.values()), [found[name] for name in wanted])


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

"""Runs a decode step both ways, as one launch and as separate kernels, in a worker process of the
tuner (autotune/worker.py): holds what each layer of the one writes into its cache, and the logits,
against the other's, and times both as CUDA graphs over the same weights, caches and inputs.

Weights are drawn, of the sizes that the graph says: what is timed does not depend on their values,
and a model's own need not be read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..autotune.space import Config
from ..codegen.persistent.reading import Shape, read_decode
from ..codegen.program import Program
from ..codegen.triton.backend import OwnBytes
from ..ir.graph import Graph, param_name
from ..ir.parser import parse_graph
from ..runtime.runner import ProgramRunner
from ..runtime.step_buffer import FIELDS, GROUPS, SAMPLING

WAY, KERNELS, ONE_LAUNCH = "decode", "kernels", "persistent"
ROUNDING, FARTHEST = 0.1, 0.6
"""How far logits, keys and values may be off, in root mean squares over their standard deviation:
bfloat16 rounded at other places of all layers gives some hundredths, a wrong key in one layer 0.4
of logits, and more of what the next layer writes. Where activations are rounded to codes, another
code here and there is a sixteenth off, and layer upon layer adds to it: then each is allowed
`AMPLIFIED` times what a last bit of the embedding makes of it, between these two. The first layers'
are as near as ever, and all layers are one text."""
AMPLIFIED = 1.5
BLOCK = 8
"""Steps between two clocks."""
_CHECKED = 3  # steps in a row at each length: each reads what the one before has written
_STD = 0.02
_CODE_RMS = {4: 4.3, 8: 1.0}  # of codes as they are drawn here


def build(spec: Mapping[str, Any]) -> DecodeRunner:
    """The runner of a step, as `DecodeTunable.runner` describes it."""
    return DecodeRunner(spec)


class DecodeRunner:
    """A decode step of one model on the current device.

    Args:
        spec: ``folder`` (with graph.txt, and of each way its Program and its files), ``batch``,
            ``lengths`` (of the context).
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.folder, self.batch = Path(str(spec["folder"])), int(spec["batch"])
        self.lengths = [int(length) for length in spec["lengths"]]
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else _CPU
        graph = parse_graph((self.folder / "graph.txt").read_text(encoding="utf-8"))
        shape = read_decode(graph)
        self.weights = drawn_weights(graph, shape, self.device)
        reference = self._loaded(KERNELS)
        program = reference.program
        caches = [name for name in program.inputs if "cache" in name]
        rests = [tuple(map(int, map(str, program.buffers[n].shape[1:]))) for n in caches]
        vocab = shape.results[shape.calls[-1].out]
        self.inputs = StepInputs(self.batch, self.lengths[-1], rests[0][0], vocab, self.device)
        pages = 1 + self.inputs.tables.numel()
        self.caches = {
            name: torch.empty(pages, *rest, dtype=torch.bfloat16, device=self.device)
            for name, rest in zip(caches, rests, strict=True)
        }
        self.runners = {KERNELS: reference}
        self.captured: dict[str, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.expected = self._observed(reference)
        self.tolerances = [ROUNDING] * len(self.expected)
        if shape.codes is not None and shape.codes.rounds:
            noise = self._noise(reference, self.weights[shape.calls[0].weight])
            self.tolerances = [min(max(ROUNDING, AMPLIFIED * one), FARTHEST) for one in noise]

    def prepare(self, config: Config) -> None:
        """Loads one of both ways."""
        way = str(config[WAY])
        if way not in self.runners:
            self.runners[way] = self._loaded(way)

    def check(self, config: Config) -> float:
        """The largest error of its logits, keys and values against the separate kernels', in units
        of what is tolerated; inf for NaN.

        Raises:
            KernelError: a launch was given up.
        """
        runner = self.runners[str(config[WAY])]
        found = self._observed(runner)
        check_launches(runner)
        pairs = zip(self._off(found), self.tolerances, strict=True)
        errors = [off / tolerance for off, tolerance in pairs]
        return max(errors) if all(map(math.isfinite, errors)) else math.inf

    def time(self, config: Config, rounds: int) -> list[float]:
        """Seconds of a step, the mean over the lengths, ``rounds`` times.

        Raises:
            KernelError: a launch was given up.
        """
        way = str(config[WAY])
        if way not in self.captured:
            self.captured[way] = self._capture(self.runners[way])
        graph, logits = self.captured[way]
        found = [
            sum(self._replayed(graph, length) for length in self.lengths) / len(self.lengths)
            for _ in range(rounds)
        ]
        check_launches(self.runners[way])
        if not bool(logits.isfinite().all()):
            raise RuntimeError("its logits are not finite")
        return found

    def facts(self) -> dict[str, Any]:
        """The device."""
        gpu = self.device.type == "cuda"
        return {"device": torch.cuda.get_device_name(self.device) if gpu else "cpu"}

    def _loaded(self, way: str) -> ProgramRunner:
        text = (self.folder / f"{way}.json").read_text(encoding="utf-8")
        program = Program.from_json(json.loads(text))
        files = self.folder / way

        def read(name: str) -> bytes:
            return OwnBytes((files / name).read_bytes())  # the parent has just written them

        return ProgramRunner(program, self.weights, read, device=self.device)

    def _run(self, runner: ProgramRunner) -> torch.Tensor:
        return runner.run({**self.inputs.tensors, **self.caches})["logits"]

    def _observed(self, runner: ProgramRunner) -> list[torch.Tensor]:
        """f32[steps, B, N] each, of some steps in a row at each length, over caches that are the
        same each time: the logits, and what the steps write into each cache.
        """
        generator = torch.Generator(self.device).manual_seed(1)
        for tensor in self.caches.values():
            tensor.normal_(generator=generator)
        found = []
        for length in self._steps():
            self.inputs.place(length)
            logits = self._run(runner)
            slots = self.inputs.tensors["slot_mapping"]
            rows = (cache.flatten(0, 1)[slots].flatten(1) for cache in self.caches.values())
            found.append([one.float().clone() for one in (logits, *rows)])
        return [torch.stack(each) for each in zip(*found, strict=True)]

    def _off(self, found: list[torch.Tensor]) -> list[float]:
        """How far each is from that of the separate kernels, where it is most."""
        pairs = zip(found, self.expected, strict=True)
        far = [(one - own).square().mean(-1).sqrt() / own.std(-1) for one, own in pairs]
        return [float(one.max()) for one in far]

    def _noise(self, runner: ProgramRunner, embedding: torch.Tensor) -> list[float]:
        """How far each goes when each number of the tokens' embeddings moves by about its last
        bit.
        """
        steps = [self.inputs.tokens(length) for length in self._steps()]
        rows = torch.cat(steps).unique()
        kept = embedding[rows]
        generator = torch.Generator(self.device).manual_seed(2)
        up = torch.empty_like(kept).bernoulli_(0.5, generator=generator)
        embedding[rows] = kept * (1 + (2 * up - 1) * torch.finfo(kept.dtype).eps)
        found = self._off(self._observed(runner))
        embedding[rows] = kept
        return found

    def _steps(self) -> list[int]:
        """Lengths of the steps that are compared: some in a row up to each that is timed."""
        return [
            length
            for last in self.lengths
            for length in range(max(1, last - _CHECKED + 1), last + 1)
        ]

    def _capture(self, runner: ProgramRunner) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self._run(runner)  # what is set up or copied at first
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run(runner)
        return graph, logits

    def _replayed(self, graph: torch.cuda.CUDAGraph, length: int) -> float:
        """Seconds of a step of this length, the mean over a block of them behind one more."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.inputs.place(length)
        graph.replay()
        begin.record()
        for _ in range(BLOCK):
            graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / BLOCK


class StepInputs:
    """Inputs of a greedy step of several sequences of one length, over pages in random order.

    Args:
        batch: sequences.
        longest: tokens of the longest context.
        page: tokens of a page.
        vocab: tokens that there are.
        device: where the inputs lie.

    Attributes:
        tensors: by name; ``tables`` is i32[B, M] of them.
    """

    def __init__(
        self, batch: int, longest: int, page: int, vocab: int, device: torch.device
    ) -> None:
        self.page, self.vocab = page, vocab
        pages = -(-longest // page)
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0))
        self.tables = (1 + order).view(batch, pages).int().to(device)  # page 0 is nobody's
        kinds = {**FIELDS, **SAMPLING, **GROUPS}
        self.tensors = {
            name: torch.zeros(batch, dtype=dtype, device=device) for name, dtype in kinds.items()
        }
        self.tensors["block_tables"] = self.tables
        self.tensors["top_p"].fill_(1.0)
        self.rows = torch.arange(batch, device=device)
        self.tensors["group_rows"].copy_(self.rows)

    def tokens(self, length: int) -> torch.Tensor:
        """i64[B], others at each length."""
        return (self.rows + length * len(self.rows)) % self.vocab

    def place(self, length: int) -> None:
        """Makes them those of the step whose tokens are the last of so many."""
        last = length - 1
        self.tensors["token_ids"].copy_(self.tokens(length))
        self.tensors["positions"].fill_(last)
        self.tensors["seq_lens"].fill_(length)
        first = self.tables[:, last // self.page].long() * self.page
        self.tensors["slot_mapping"].copy_(first + last % self.page)


def drawn_weights(graph: Graph, shape: Shape, device: torch.device) -> dict[str, torch.Tensor]:
    """Weights of a decode graph by name, the same in every process: norms are ones, frequencies
    those of rope, and what multiplies is as small as in a model before its training. Codes of 4
    bits are 1 to 15, around 8, which means zero: with 0 too, half a unit of each weight would add
    up over a row, and a model of 4096 columns be chaos behind its first layer.
    """
    norms = {step.norm for step in shape.calls}
    scales = {step.scale for step in shape.calls}
    small = _STD / _CODE_RMS[shape.codes.bits] if shape.codes is not None else _STD
    generator = torch.Generator(device).manual_seed(0)
    found = {}
    for node in graph.params:
        name, dtype = param_name(node), node.dtype.torch
        sizes = tuple(int(str(size)) for size in node.shape)
        tensor = torch.empty(sizes, dtype=dtype, device=device)
        if name == shape.inv_freq:
            tensor.copy_(10000.0 ** -(torch.arange(sizes[0]) / sizes[0]))
        elif name in norms or name in scales:
            tensor.fill_(1.0 if name in norms else small)
        elif dtype.itemsize == 1 and dtype.is_floating_point:  # torch draws no 8-bit numbers
            wide = torch.empty(sizes, dtype=torch.bfloat16, device=device)
            tensor.copy_(wide.normal_(generator=generator))
        elif dtype.is_floating_point:
            tensor.normal_(0.0, _STD, generator=generator)
        else:
            tensor.random_(1, 16, generator=generator)
            tensor += 16 * torch.empty_like(tensor).random_(1, 16, generator=generator)
        found[name] = tensor
    return found


def check_launches(runner: ProgramRunner) -> None:
    """Waits for the device; KernelError where a launch for all layers was given up."""
    for _, kernel in runner.steps:
        decode = getattr(kernel, "decode", None)
        if decode is not None:
            decode.check()


_CPU = torch.device("cpu")

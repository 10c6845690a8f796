"""The numbers that a compile compares: passes against each other, the Program against its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch

from ..codegen.base import Backend, Lowered
from ..codegen.triton.interpreted import can_interpret
from ..errors import UnsupportedError
from ..ir.graph import Graph, param_name
from ..ir.interpreter import interpret
from ..passes.driver import VerifyLevel
from ..passes.heads import HeadPlan
from ..passes.quantize import Recipe
from ..runtime.runner import ProgramRunner
from ..targets import Target
from .changes import changed_graphs, lowered_graphs
from .graphs import LoweredGraphs, Passed
from .hf_model import capture_causal_lm
from .lowering import lower
from .options import CompileOptions
from .sample_model import sample_source
from .sources import Source
from .trial import outputs_error, program_error
from .verified import check_key, remember, remembered

Cases: TypeAlias = Sequence[Sequence[torch.Tensor]]


class Checks:
    """Compares numbers: on one layer of each kind where that stands for the whole model.

    Args:
        source: the model.
        options: of the compile; ``verify`` says how much is compared.
        backend: whose Program is compared.
        limit: longest sequence of a causal LM, None for plain modules.
        recipe: of the linears that are quantized.
        heads: of the KV heads that become fewer.

    Attributes:
        level: what is left for the passes over the whole model to check.
        largest_error: relative, of the Program and of the passes over the cut model; None without
            a check.
    """

    def __init__(
        self,
        source: Source,
        options: CompileOptions,
        backend: Backend,
        limit: int | None,
        recipe: Recipe | None = None,
        heads: HeadPlan | None = None,
    ) -> None:
        self.recipe, self.heads = recipe, heads
        self.source, self.options, self.backend, self.limit = source, options, backend, limit
        self.level = options.verify
        self.largest_error: float | None = None

    def on_one_of_each_layer(self) -> None:
        """Compiles a causal LM cut to one layer of each kind, with all numbers compared.

        Raises:
            VerificationError: a pass or the backend computes something else; it is named.
        """
        if self.limit is None or self.level != "sample":
            return
        cut = sample_source(self.source)
        if cut is None:
            return
        graph = lower(capture_causal_lm(cut.module), "sample", cut.weights)
        vocabulary = int(str(graph.outputs[0].shape[-1]))
        ids = (torch.randint(vocabulary, (1, 8), generator=torch.Generator().manual_seed(0)),)
        cache = self.options.cache

        def passed_at(level: VerifyLevel) -> Passed:
            options, recipe = self.options, self.recipe
            return changed_graphs(
                graph, cache, self.backend, level, ids, options, recipe, self.heads
            )

        passed = passed_at("structure")
        lowered = lowered_graphs(passed, self.backend, self.options, self.limit)
        self.strictly(lowered)  # now, not behind the whole model
        # Maps of heads are in memory: no key stands for them.
        key = None if self.heads else check_key(passed.graphs, lowered, cut.weights)
        error = remembered(key)
        if error is None:
            with ThreadPoolExecutor(1) as beside:  # most of the other's work is in processes
                of_programs = beside.submit(self._error, passed, lowered, ids)
                checked = passed_at("full")
                records = (*checked.records, *checked.decode_records)
                error = max([of_programs.result(), *(r.max_error or 0.0 for r in records)])
            remember(key, error)
        self.largest_error = error
        self.level = "structure"

    def strictly(self, lowered: LoweredGraphs) -> None:
        """UnsupportedError where the backend left something to another one, and none of that was
        to be; it names all of it.
        """
        notes = [*lowered.general.notes, *(lowered.decode.notes if lowered.decode else ())]
        if self.options.strict and notes:
            raise UnsupportedError(
                f"option strict with backend {self.backend.name!r}",
                expected="a model that the backend computes by itself, and whole",
                found="; ".join(dict.fromkeys(notes)),
                remedy="Leave strict out, and the engine's report tells of the same; or use "
                "another backend.",
            )

    def of_programs(
        self, passed: Passed, lowered: LoweredGraphs, samples: Sequence[torch.Tensor]
    ) -> None:
        """Compares the Programs with the interpreter, where the cut model did not stand for them.

        Args:
            passed: the graphs.
            lowered: what the backend made of them.
            samples: one tensor an input of the captured graph.

        Raises:
            VerificationError: a Program computes something else.
        """
        if self.level in ("sample", "full"):
            self.largest_error = self._error(passed, lowered, samples)

    def _error(
        self, passed: Passed, lowered: LoweredGraphs, samples: Sequence[torch.Tensor]
    ) -> float:
        """The largest error of either Program. The one that decodes also runs on one token: many
        kernels have a variant for it. One launch for all layers runs where its device is.
        """
        elsewhere = not self.options.target.is_cpu and self._device() != torch.device("cuda")
        decode = lowered.kernels if lowered.kernels and elsewhere else lowered.decode
        cases = [samples]
        if self.limit is not None:
            cases.append([ids[:, :1] for ids in samples])
        inputs = [passed.inputs(case) for case in cases]
        if passed.decode is None or decode is None:
            return self._program_error(passed.final, lowered.general, inputs)
        decoded = [passed.decode_inputs(case) for case in cases]
        tasks = [
            (passed.final, lowered.general, inputs[:1]),
            (passed.decode, decode, decoded),
        ]
        # Triton's interpreter is one a process: only those of other processes work side by side.
        with ThreadPoolExecutor(len(tasks) if self._device() is None else 1) as pool:
            return max(pool.map(lambda task: self._program_error(*task), tasks))

    def _program_error(self, graph: Graph, lowered: Lowered, cases: Cases) -> float:
        device = self._device()
        if device is None:
            return program_error(graph, lowered, cases)
        weights = {
            param_name(node): graph.weights[param_name(node)].load() for node in graph.params
        }
        placed = {name: weight.to(device) for name, weight in weights.items()}
        read = lowered.files.__getitem__
        runner = ProgramRunner(lowered.program, placed, read, device=device)
        return max(self._case_error(graph, runner, weights, inputs) for inputs in cases)

    def _case_error(
        self,
        graph: Graph,
        runner: ProgramRunner,
        weights: Mapping[str, torch.Tensor],
        inputs: Sequence[torch.Tensor],
    ) -> float:
        with torch.no_grad():
            expected = interpret(graph, inputs, weights)
        # The Program writes its state in place: it gets copies.
        copies = [tensor.clone() for tensor in inputs]
        found = runner.run(dict(zip(runner.program.inputs, copies, strict=True)))
        here = {name: tensor.cpu() for name, tensor in found.items()}
        return outputs_error(f"backend {self.backend.name}", graph, inputs, expected, here)

    def _device(self) -> torch.device | None:
        """Where the Program can run in this process; None where its kernels need another one, with
        Triton's interpreter.
        """
        target = self.options.target
        if not target.is_cpu and Target.detect().arch == target.arch:
            return torch.device("cuda")
        if self.backend.name == "triton" and not can_interpret():
            return None
        return torch.device("cpu")

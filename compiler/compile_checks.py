"""The numbers that a compile compares: passes against each other, the Program against its graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..codegen.base import Backend, Lowered
from ..codegen.triton.interpreted import can_interpret
from ..ir.graph import Graph, param_name
from ..ir.interpreter import interpret
from ..passes.cache_samples import adapt_to_pages, adapt_to_slots
from ..passes.driver import largest_error, run_passes
from ..passes.pipeline import pipeline
from ..runtime.runner import ProgramRunner
from ..targets import Target
from .hf_model import capture_causal_lm
from .lowering import lower
from .options import CompileOptions
from .sample_model import sample_source
from .sources import Source
from .verified import check_key, remember, remembered


class Checks:
    """Compares numbers: on one layer of each kind where that stands for the whole model.

    Args:
        source: the model.
        options: of the compile; ``verify`` says how much is compared.
        backend: whose Program is compared.
        limit: longest sequence of a causal LM, None for plain modules.

    Attributes:
        level: what is left for the passes over the whole model to check.
        largest_error: relative, of the Program and of the passes over the cut model; None without
            a check.
    """

    def __init__(
        self, source: Source, options: CompileOptions, backend: Backend, limit: int | None
    ) -> None:
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
        passes = pipeline(self.options.cache, self.backend.fuses)
        final, records = run_passes(graph, passes, level="structure", samples=ids)
        lowered = self.backend.lower(final, self.options.target, self.limit)
        key = check_key((graph, *(record.graph for record in records)), lowered, cut.weights)
        error = remembered(key)
        if error is None:
            final, records = run_passes(graph, passes, level="full", samples=ids)
            error = self._program_error(final, lowered, self._adapted(graph, final, ids))
            error = max([error, *(record.max_error or 0.0 for record in records)])
            remember(key, error)
        self.largest_error = error
        self.level = "structure"

    def of_program(
        self, graph: Graph, final: Graph, lowered: Lowered, samples: Sequence[torch.Tensor]
    ) -> None:
        """Compares the Program with the interpreter, where the cut model did not stand for it.

        Args:
            graph: before the passes.
            final: after them.
            lowered: what the backend made of ``final``.
            samples: one tensor an input of ``graph``.

        Raises:
            VerificationError: the Program computes something else.
        """
        if self.level in ("sample", "full"):
            inputs = self._adapted(graph, final, samples)
            self.largest_error = self._program_error(final, lowered, inputs)

    def _adapted(
        self, graph: Graph, final: Graph, samples: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        if self.limit is None:
            return tuple(samples)
        adapt = adapt_to_pages if self.options.cache == "paged" else adapt_to_slots
        return adapt(graph, final, samples)

    def _program_error(
        self, graph: Graph, lowered: Lowered, inputs: Sequence[torch.Tensor]
    ) -> float:
        device = self._device()
        if device is None:
            from .trial import program_error

            return program_error(graph, lowered, inputs)
        weights = {
            param_name(node): graph.weights[param_name(node)].load() for node in graph.params
        }
        with torch.no_grad():
            expected = interpret(graph, inputs, weights)
        placed = {name: weight.to(device) for name, weight in weights.items()}
        read = lowered.files.__getitem__
        runner = ProgramRunner(lowered.program, placed, read, device=device)
        # The Program writes its state in place: it gets copies.
        copies = [tensor.clone() for tensor in inputs]
        found = runner.run(dict(zip(lowered.program.inputs, copies, strict=True)))
        here = [tensor.cpu() for tensor in found.values()]
        return largest_error(f"backend {self.backend.name}", expected, here)

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

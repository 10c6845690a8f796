"""The graphs of a model: the general one and, of a causal LM whose backend fuses, the decode graph;
both lowered, checked and told apart in one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ..autotune.store import Store
from ..codegen.base import CHOICES, Backend, Lowered
from ..codegen.program import Json
from ..errors import UnsupportedError
from ..ir.dtypes import DType
from ..ir.graph import Graph, Weight
from ..passes.base import Pass
from ..passes.cache_samples import adapt_to_pages, adapt_to_slots
from ..passes.driver import PassRecord, VerifyLevel, run_passes
from ..passes.heads import HeadPlan
from ..passes.one_token import takes_one_token
from ..passes.open_rows import OPEN_ROWS
from ..passes.pipeline import decode_pipeline, pipeline
from ..passes.quantize import Recipe
from ..passes.sinks import Window
from ..runtime.decode_graphs import obstacles
from ..targets import Target

Tensors = Sequence[torch.Tensor]
CacheKind = Literal["paged", "slot"] | None


@dataclass(frozen=True, slots=True)
class Passed:
    """What passes made of a captured graph.

    Attributes:
        captured: before them.
        cache: form of the KV cache; None for plain modules.
        records: of the passes to the general graph, at least one.
        decode_records: of those from ``fork`` to the decode graph; none where there is no such
            graph.
        fork: the last graph that both have in common.
        page_size: of a paged cache.
    """

    captured: Graph
    cache: CacheKind
    records: list[PassRecord]
    fork: Graph
    page_size: int
    decode_records: list[PassRecord] = field(default_factory=list)

    @property
    def final(self) -> Graph:
        """The general graph."""
        return self.records[-1].graph if self.records else self.captured

    @property
    def decode(self) -> Graph | None:
        """The decode graph, None where there is none."""
        return self.decode_records[-1].graph if self.decode_records else None

    @property
    def graphs(self) -> list[Graph]:
        """Every graph on the way."""
        return [self.captured, *(r.graph for r in (*self.records, *self.decode_records))]

    def inputs(self, samples: Tensors) -> tuple[torch.Tensor, ...]:
        """Inputs of the general graph for those of the captured one."""
        return _adapted(self.captured, self.final, self.cache, samples)

    def decode_inputs(self, samples: Tensors) -> tuple[torch.Tensor, ...]:
        """Inputs of the decode graph for those of the captured one."""
        inputs = adapt_to_pages(self.captured, self.fork, samples, self.page_size)
        graph = self.fork
        steps = decode_pipeline(self.page_size)
        for step, record in zip(steps, self.decode_records, strict=False):
            if step.adapt_inputs is not None:
                inputs = step.adapt_inputs(graph, record.graph, inputs)
            graph = record.graph
        return inputs


def pass_graphs(
    captured: Graph,
    cache: CacheKind,
    backend: Backend,
    level: VerifyLevel,
    samples: Tensors | None,
    page_size: int,
    deterministic: bool = False,
    recipe: Recipe | None = None,
    stored: str | None = None,
    codes: DType | None = None,
    heads: HeadPlan | None = None,
    window: Window | None = None,
) -> Passed:
    """Runs the pipelines, each pass checked as ``run_passes`` does.

    A ``recipe`` says which linears are quantized, and how; ``stored`` what becomes of codes that
    the checkpoint has (pipeline); ``codes`` what a paged cache holds; ``heads`` which KV heads
    become one; ``window`` what a sequence keeps. A ``deterministic`` model has no decode graph: a
    step alone and a step among others are one graph's, and one set of kernels'.

    Raises:
        VerificationError: a pass whose result is ill-formed or computes something else.
    """
    steps = pipeline(cache, backend.fuses, deterministic, recipe, stored, codes, heads, window)
    loaded: dict[Weight, torch.Tensor] = {}
    final, records = run_passes(captured, steps, level=level, samples=samples, loaded=loaded)
    fork = _before_fusion(captured, steps, records)
    passed = Passed(captured, cache, records, fork, page_size)
    done = len(records) == len(steps)  # a pass limit within the pipeline leaves no decode graph
    has_decode = cache == "paged" and backend.own_kernels and done and not deterministic
    if not has_decode or not takes_one_token(fork):
        return passed
    inputs = None if samples is None else adapt_to_pages(captured, fork, samples, page_size)
    more = decode_pipeline(page_size)
    _, found = run_passes(fork, more, level=level, samples=inputs, first=len(steps), loaded=loaded)
    return replace(passed, decode_records=found)


def _before_fusion(captured: Graph, steps: Sequence[Pass], records: Sequence[PassRecord]) -> Graph:
    """The graph before ``OPEN_ROWS`` and ``FUSE``; the last one where they did not run."""
    graph = captured
    for step, record in zip(steps, records, strict=False):
        if step.name == OPEN_ROWS.name:
            return graph
        graph = record.graph
    return graph


@dataclass(frozen=True, slots=True)
class LoweredGraphs:
    """What a backend made of the graphs.

    Attributes:
        general, decode: their Programs, with files and notes.
        kernels: the decode Program without its one launch; None where it has none.
        steps: which way decode steps go, and why (decode_choice.py); None where there is no decode
            Program.
    """

    general: Lowered
    decode: Lowered | None
    kernels: Lowered | None = None
    steps: dict[str, Json] | None = None

    @property
    def files(self) -> Mapping[str, bytes]:
        """The artifacts of both: equal kernels have equal paths. What was looked up for either one
        stands in one file.
        """
        if self.decode is None:
            return self.general.files
        one, other = self.general.files, self.decode.files
        both = {**one, **other}
        if CHOICES in one and CHOICES in other:
            both[CHOICES] = type(one[CHOICES])(one[CHOICES] + other[CHOICES])
        return both

    @property
    def weights(self) -> frozenset[str]:
        """Names of the weights that a Program reads, or that its kernels take in at load."""
        parts = (self.general, *((self.decode,) if self.decode else ()))
        return frozenset(
            name
            for part in parts
            for name in (
                *part.program.weights.values(),
                *(name for call in part.program.calls for name in call.constants),
            )
        )


def lower_graphs(
    passed: Passed,
    backend: Backend,
    target: Target,
    limit: int | None,
    deterministic: bool = False,
    max_sequences: int | None = None,
    tuning: Store | None = None,
    one_launch: Sequence[int] | Literal["auto"] = (),
) -> LoweredGraphs:
    """Lowers the graphs of a model; ``limit`` is a causal LM's context, ``max_sequences`` the most
    of them in a step, and ``tuning`` what is known of kernels; a deterministic model takes nothing
    of it. A decode Program that no CUDA graph can hold would bring nothing: it is left out. With
    ``one_launch`` steps of these numbers of sequences are each that; "auto" leaves it to records.

    Raises:
        UnsupportedError: the decode graph has a call that ``one_launch`` does not know, which is
            named, or there is no decode graph.
    """
    known = None if deterministic else tuning
    slots = max_sequences if passed.cache == "slot" and not backend.own_kernels else None
    general = backend.lower(passed.final, target, limit, deterministic, slots, known)
    if passed.decode is None:
        if one_launch not in ("auto", ()):
            raise _no_decode_graph(backend)
        return LoweredGraphs(general, None)
    decode = backend.lower(passed.decode, target, limit, max_sequences=max_sequences, tuning=tuning)
    if one_launch == "auto" or not one_launch:
        if obstacles(decode.program):
            return LoweredGraphs(general, None)
        if not one_launch:
            return LoweredGraphs(general, decode, steps=_as_asked(()))
        from .decode_choice import choose_steps  # brings Triton's templates

        choice = choose_steps(decode, passed.decode, target, max_sequences, limit, tuning)
        kernels = decode if choice.batches else None
        return LoweredGraphs(general, choice.lowered, kernels, choice.facts)
    from ..codegen.persistent.lowering import with_one_launch

    one = with_one_launch(decode, passed.decode, target, one_launch)
    return LoweredGraphs(general, one, decode, _as_asked(one_launch))


def _as_asked(one_launch: Sequence[int]) -> dict[str, Json]:
    """What the report says of decode steps that go as the user has said."""
    numbers = ", ".join(map(str, one_launch))
    why = f"asked for, where there are {numbers} sequences" if one_launch else "asked for"
    return {"way": "persistent" if one_launch else "kernels", "why": why, "steps": {}}


def _no_decode_graph(backend: Backend) -> UnsupportedError:
    return UnsupportedError(
        "option decode='persistent'",
        expected="a decode graph: a causal LM on Triton, its cache paged, not deterministic",
        found=f"none; the backend is {backend.name}",
        remedy="Leave the option out.",
    )


def _adapted(
    before: Graph, after: Graph, cache: CacheKind, samples: Tensors
) -> tuple[torch.Tensor, ...]:
    if cache is None:
        return tuple(samples)
    return (adapt_to_pages if cache == "paged" else adapt_to_slots)(before, after, samples)

"""What a compile changes of a model on purpose: fewer KV heads first, codes after that."""

from __future__ import annotations

from collections.abc import Callable

from ..codegen.base import Backend
from ..codegen.program import Json
from ..ir.graph import Graph
from ..passes.driver import VerifyLevel
from ..passes.heads import HeadPlan
from ..passes.quantize import Recipe
from .graphs import CacheKind, LoweredGraphs, Passed, Tensors, lower_graphs, pass_graphs
from .heads.plan import make_heads
from .heads.report import heads_report
from .options import CompileOptions
from .quality.report import Quality
from .quantizing import make_recipe, quality_of
from .sources import Source


def make_changes(
    graph: Graph, source: Source, options: CompileOptions, limit: int | None
) -> tuple[HeadPlan | None, Recipe | None]:
    """What becomes of the KV heads and, with these, of the linears; errors as ``make_heads`` and
    ``make_recipe`` have them.
    """
    heads = make_heads(graph, source, options.heads, limit)
    return heads, make_recipe(graph, source, options, limit, heads)


def changed_graphs(
    graph: Graph,
    cache: CacheKind,
    backend: Backend,
    level: VerifyLevel,
    samples: Tensors | None,
    options: CompileOptions,
    recipe: Recipe | None,
    heads: HeadPlan | None,
) -> Passed:
    """``pass_graphs`` as the options have it, with these changes."""
    return pass_graphs(
        graph,
        cache,
        backend,
        level,
        samples,
        options.page_size,
        options.deterministic,
        recipe,
        options.stored,
        options.codes,
        heads,
        options.window,
    )


def lowered_graphs(
    passed: Passed, backend: Backend, options: CompileOptions, limit: int | None
) -> LoweredGraphs:
    """``lower_graphs`` as the options have it; ``limit`` is a causal LM's context."""
    return lower_graphs(
        passed,
        backend,
        options.target,
        limit,
        options.deterministic,
        options.max_batch_size,
        options.records,
        options.one_launch,
    )


def costs_of(
    graph: Graph,
    source: Source,
    recipe: Recipe | None,
    limit: int | None,
    heads: HeadPlan | None,
    advance: Callable[[float], None],
) -> tuple[Quality | None, dict[str, Json] | None]:
    """The quality after quantization, and the report on heads; None where nothing was changed, or
    the quality not asked for. ``advance`` is called with the share of the quality that is measured.
    """
    quality = quality_of(graph, source, recipe, limit, heads, advance)
    return quality, heads_report(graph, source, heads, limit)

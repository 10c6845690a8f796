"""Quantization within a compile: the recipe of a model, and what the report says of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from ..codegen.base import get_backend
from ..codegen.program import Json
from ..errors import UnsupportedError, UsageError
from ..formats.prequantized import CODES
from ..formats.weights import Stored, Weight, weight_leaves
from ..ir.graph import Graph, param_name
from ..passes.expressions import expressions
from ..passes.heads import HeadPlan
from ..passes.keep_codes import KEEP_CODES, expanded_weights, kept_linears
from ..passes.quantize import Recipe, linears_to_quantize
from ..passes.schemes import QuantConfig
from ..targets import Target
from .calibrate.recipe import calibrate, needs_samples, plain_graph
from .calibrate.text import calibration_samples, measured_text
from .graphs import Passed
from .options import CompileOptions
from .quality.report import Quality, assess
from .quality.sensitivity import stored_bytes
from .sources import Source, source_tokenizer

_GRID_GROUP = 32  # of ggml's 4-bit types


def make_recipe(
    captured: Graph,
    source: Source,
    options: CompileOptions,
    limit: int | None,
    heads: HeadPlan | None = None,
) -> Recipe | None:
    """What the options ask for, calibrated on text where the method needs it; None without
    quantization.

    Args:
        captured: the lowered graph, before passes.
        source: the model.
        options: of the compile.
        limit: longest sequence of a causal LM, None for plain modules.
        heads: of the KV heads that become fewer first.

    Raises:
        UnsupportedError: a method that needs text, for a model without a tokenizer; or a model
            without a linear to quantize.
        UsageError: a text that is too short, or a pattern that matches nothing.
    """
    config = options.quantize
    if config is None:
        return None
    graph = plain_graph(captured, heads)
    if not linears_to_quantize(graph, config):
        raise UnsupportedError(
            f"quantize={config.scheme!r} of {source.name}",
            expected="linears whose weights are parameters",
            found="none that may be quantized",
            remedy="Leave quantize out, or correct QuantConfig(skip=…, lm_head=…).",
        )
    if not needs_samples(config):
        return calibrate(graph, (), config)
    tokenizer = source_tokenizer(source)
    if limit is None or tokenizer is None:
        raise UnsupportedError(
            f"method {config.method!r} of {config.scheme} for {source.name}",
            expected="a causal LM with a tokenizer, to calibrate on text",
            found="a plain module" if limit is None else "no tokenizer",
            remedy="Compile a model folder or .gguf file, or choose another scheme or "
            "method='rtn'.",
        )
    samples = [(ids,) for ids in calibration_samples(tokenizer, config, limit)]
    return calibrate(graph, samples, config)


def quality_of(
    captured: Graph,
    source: Source,
    recipe: Recipe | None,
    limit: int | None,
    heads: HeadPlan | None = None,
    advance: Callable[[float], None] = lambda share: None,
) -> Quality | None:
    """The quality of a quantized causal LM, where its configuration asks for it: against the model
    in numbers, whose ``heads`` are converted already.

    Args:
        captured: the lowered graph, before passes.
        source: the model.
        recipe: that it is quantized by.
        limit: longest sequence, None for plain modules.
        advance: called with the share that is done.

    Raises:
        UnsupportedError: a model without a tokenizer.
        UsageError: a text that is too short.
    """
    if recipe is None or not (recipe.config.report or recipe.config.sensitivity):
        return None
    config, tokenizer = recipe.config, source_tokenizer(source)
    ids, text = measured_text(
        source.name, tokenizer, limit, config.report_text, config.report_tokens
    )
    calibrated = needs_samples(config) and config.calibrate == config.report_text
    return assess(
        plain_graph(captured, heads),
        recipe,
        ids,
        text,
        not calibrated,
        limit,
        config.report_tokens,
        advance,
    )


def quantization_facts(
    passed: Passed, recipe: Recipe, quality: Quality | None = None
) -> dict[str, Json]:
    """What was quantized, for ``report.json``.

    Keys: ``scheme``, ``method``, ``group``, ``symmetric``, ``compute``; ``linears`` and
    ``parameters`` that are quantized; ``bits_per_weight`` of these, scales and zero points counted;
    ``bytes`` of them and ``bytes_before``; ``kept`` (names of the matrices that stay as they are),
    ``source_in_four_bits`` (whether a GGUF file held the weights in such groups of four bits
    already, up to where the grid begins: the quality is then no result) and ``quality``
    (Quality.to_json, None where it is not measured).
    """
    config = recipe.config
    before = before_quantizing(passed)
    chosen = linears_to_quantize(before, config)
    count = sum(math.prod(before.weights[name].shape) for name in chosen)
    matrices = [param_name(node) for node in before.params if node.type.rank > 1]
    size = sum(stored_bytes(weight) for weight in quantized_parts(passed.final, chosen))
    weights = list(expressions(before, chosen).values())
    return {
        "scheme": config.scheme,
        "method": config.method,
        "group": config.group,
        "symmetric": config.symmetric,
        "compute": config.compute,
        "linears": len(chosen),
        "parameters": count,
        "bits_per_weight": round(size * 8 / count, 4),
        "bytes": size,
        "bytes_before": sum(stored_bytes(weight) for weight in weights),
        "kept": [name for name in matrices if name not in chosen],
        "source_in_four_bits": on_own_grid(weights, config),
        "quality": None if quality is None else quality.to_json(),
    }


def stored_facts(passed: Passed, source: Source, anew: Recipe | None) -> dict[str, Json] | None:
    """What became of a checkpoint in codes, for ``report.json``; None for one in numbers. A recipe
    quantizes the numbers ``anew``.

    Keys: ``method`` (its ``quant_method``, or "gguf"); ``linears`` that keep their codes, ``bytes``
    of these with scales and zero points; ``expanded`` (names of the weights that became numbers).
    """
    if source.quantized_by is None:
        return None
    kept = kept_linears(before_quantizing(passed)) if anew is None else {}
    return {
        "method": source.quantized_by,
        "linears": len(kept),
        "bytes": sum(stored_bytes(weight) for weight in quantized_parts(passed.final, kept)),
        "expanded": [*expanded_weights(passed.final)],
    }


def computed_codes(target: Target) -> frozenset[torch.dtype]:
    """The types of codes that a device has products of; a CPU has them of any, slowly."""
    rates = dict(target.tflops)
    return frozenset(
        dtype for dtype in CODES if target.is_cpu or str(dtype).removeprefix("torch.") in rates
    )


def keeps_codes(options: CompileOptions) -> bool:
    """Whether the matrices of a GGUF file stay in codes: where no scheme rounds them anew, and the
    backend has products of codes, or the user says so.
    """
    if options.quantize is not None or options.stored == "expanded":
        return False
    return options.stored is not None or get_backend(options.backend).reads_codes


def check_stored(source: Source, options: CompileOptions) -> None:
    """Raises UsageError where codes are to be kept of a model that has none."""
    if options.stored in ("float", "int8") and source.quantized_by is None:
        raise UsageError(
            "option quantize='stored'",
            expected="a checkpoint in codes: a quantized .gguf file, or a folder whose config.json "
            "has a quantization_config",
            found=f"{source.name}, whose weights are numbers",
            remedy="Leave the option out, or name a scheme to quantize by.",
        )


def before_quantizing(passed: Passed) -> Graph:
    """The graph that the pass ``quantize`` or ``keep_codes`` was given."""
    graph = passed.captured
    for record in passed.records:
        if record.name in ("quantize", KEEP_CODES.name):
            break
        graph = record.graph
    return graph


def quantized_parts(graph: Graph, names: Iterable[str]) -> list[Weight]:
    """The parts of these quantized weights among a graph's weights."""
    prefixes = tuple(f"{name}." for name in names)
    parts = [name for name in graph.weights if name.startswith(prefixes)]
    return list(expressions(graph, parts).values())


def on_own_grid(weights: list[Weight], config: QuantConfig) -> bool:
    """Whether 4-bit codes with zero points stand for what a GGUF file holds in four bits by groups
    anyway. Its groups begin anywhere, ours at a whole zero point: so codes may yet lose a little.
    """
    if config.scheme != "int4" or config.symmetric or not 0 < (config.group or 0) <= _GRID_GROUP:
        return False
    return any(stored_type(leaf).startswith("Q4") for w in weights for leaf in weight_leaves(w))


def stored_type(leaf: Weight) -> str:
    """The ggml type that a GGUF file holds a tensor in, "Q4_K"; "" for other checkpoints'."""
    tensor = leaf.checkpoint.tensor(leaf.name) if isinstance(leaf, Stored) else None
    return str(getattr(tensor, "type_name", ""))

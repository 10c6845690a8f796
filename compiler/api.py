"""`tilewright.compile`: from a model to an engine, the way every other entry point takes too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..autotune.effort import TuneConfig, effort_of
from ..codegen.base import Backend, get_backend
from ..codegen.triton.workers import kept_workers
from ..errors import CaptureError, UnsupportedError, UsageError
from ..ir.dims import is_name
from ..ir.graph import Graph
from ..passes.driver import PassRecord
from ..passes.heads import GQA, HeadPlan
from ..passes.quantize import Recipe
from ..passes.schemes import QuantConfig
from ..runtime.base_engine import Engine, runs_here
from ..runtime.engine import CausalLMEngine, start
from ..runtime.image import DecodePart, EngineImage, LMConfig, Signature
from ..runtime.module_engine import ModuleEngine
from ..runtime.structure import flatten
from ..targets import Target
from .backend_tunable import Make, Rivals
from .capture import DynamicShapes, Examples, capture_module
from .capture_types import Captured
from .changes import changed_graphs, costs_of, lowered_graphs, make_changes
from .compile_checks import Checks
from .compile_report import make_report
from .given_inputs import Inputs, inputs_of, may_generate
from .graphs import CacheKind, LoweredGraphs, Passed
from .hf_model import capture_causal_lm
from .lowering import lower, output_structure
from .lowering.symbols import Sizes
from .module_lm import capture_module_lm, lower_module_lm
from .open_model import open_model
from .options import DEFAULT_CONTEXT, CompileOptions, KVCacheConfig, context_of, resolve_options
from .phases import Phases, Progress
from .quantizing import check_stored, keeps_codes
from .sources import Source, source_tokenizer


def compile(
    model: nn.Module | str | Path,
    example_inputs: Examples | None = None,
    *,
    target: str | Target = "auto",
    backend: str = "auto",
    quantize: str | QuantConfig | None = None,
    attention: str | GQA | None = None,
    kv_cache: str | KVCacheConfig | None = "auto",
    dtype: str | torch.dtype = "auto",
    max_model_len: int | None = None,
    max_batch_size: int | None = None,
    dynamic_shapes: DynamicShapes = None,
    verify: str = "sample",
    trust_remote_code: bool = False,
    random_weights: int | None = None,
    deterministic: bool = False,
    memory_fraction: float = 0.9,
    tune: str | TuneConfig = "cached",
    strict: bool = False,
    decode: str = "auto",
    progress: Progress | None = None,
) -> Engine:
    """Compiles a model into an engine.

    Args:
        model: an nn.Module, a Hugging Face model, or a path: a folder, a .gguf or an .onnx file.
        example_inputs: a tuple or dict of tensors; for a plain nn.Module, or an ONNX graph.
        target: "auto" (this machine), a name of `tilewright targets`, or a Target.
        backend: "auto" (as tuned, or the default), "triton", "onnxruntime", "tensorrt" or "eager".
        quantize: of the linears: "int8-weight", "int8", "fp8", "fp8-tensor", "fp8-block",
            "fp8-weight", "int4" or a QuantConfig; of a checkpoint in codes "stored" keeps them, as
            None does, and "expanded" makes numbers of them.
        attention: "mqa", "gqa:GROUPS" or a GQA: KV heads become fewer before that.
        kv_cache: "auto", "paged", "static", or a KVCacheConfig, which may keep 8 bits; None
            compiles a causal LM as a plain module. A plain nn.Module becomes one too if its example
            is token ids i64[1, S] alone, dynamic_shapes is None, and it gives logits [1, S, V],
            tokens mixing in causal attention only; else "auto" notes why not.
        dtype: "auto" (a module's own, float32 for files), "float32", "bfloat16" or "float16".
        max_model_len: longest sequence in tokens; by default the model's own limit, at most 8192.
        max_batch_size: most sequences at once, by default 8.
        dynamic_shapes: of a plain module's inputs, as torch.export takes it.
        verify: "off", "structure", "sample" (numbers of one layer of each kind) or "full".
        trust_remote_code: whether a model folder may bring Python code of its own.
        random_weights: a seed of a model folder's weights (norms are ones), to measure shapes.
        deterministic: whether a sequence has the same bits alone and in any batch: Triton, slower.
        memory_fraction: of a GPU's memory, for weights, steps and max_batch_size whole sequences.
        tune: "cached" uses what is known of kernels and backends, "none" does not; "quick", "full"
            or a TuneConfig (trials a problem, seconds in all) measure what is not known first.
        strict: whether what the backend leaves to torch, or to parts, is an error, not a note.
        decode: "kernels"; "persistent" (":8" too): one launch a step; "auto": where it is faster.
        progress: called as phases begin.

    Returns:
        A `CausalLMEngine` (generate, stream, call for logits) or a `ModuleEngine` (call); for
        another device than this machine's an `Engine` that can only be saved.

    Raises:
        UsageError, CheckpointError, CaptureError, UnsupportedError: a wrong model or option.
        VerificationError: a pass that changed what the model computes.
    """
    options = resolve_options(
        target=target,
        backend=backend,
        quantize=quantize,
        attention=attention,
        kv_cache=kv_cache,
        dtype=dtype,
        max_model_len=max_model_len,
        max_batch_size=max_batch_size,
        verify=verify,
        trust_remote_code=trust_remote_code,
        random_weights=random_weights,
        deterministic=deterministic,
        memory_fraction=memory_fraction,
        tune=tune,
        strict=strict,
        decode=decode,
    )
    return _started(model, Inputs(example_inputs, dynamic_shapes), options, Phases(progress))


def _started(model: object, inputs: Inputs, options: CompileOptions, phases: Phases) -> Engine:
    image = phases.run(
        "compile",
        0.0,
        lambda: compile_image(model, inputs.examples, inputs.dynamic_shapes, options, phases),
    )
    if not runs_here(options.target):
        return Engine(image)
    return phases.run("start", 0.9, lambda: start(image))


def compile_image(
    model: object,
    example_inputs: Examples | None,
    dynamic_shapes: DynamicShapes,
    options: CompileOptions,
    phases: Phases,
) -> EngineImage:
    """An engine's parts, not yet started: what `compile` starts and the CLI writes to disk."""
    with kept_workers():
        return _compiled(model, example_inputs, dynamic_shapes, options, phases)


def _compiled(
    model: object,
    example_inputs: Examples | None,
    dynamic_shapes: DynamicShapes,
    options: CompileOptions,
    phases: Phases,
) -> EngineImage:
    source = phases.run("open", 0.0, lambda: open_model(model, options))
    check_stored(source, options)
    inputs = inputs_of(source, example_inputs, dynamic_shapes)

    def anew(other: CompileOptions) -> EngineImage:
        return _compiled(model, example_inputs, dynamic_shapes, other, Phases())

    if source.is_causal_lm and options.cache is not None and example_inputs is None:
        return _compile_lm(source, inputs, options, phases, anew)
    if not may_generate(source, inputs, options):
        return _compile_module(source, inputs, options, phases)
    try:
        return _compile_lm(source, inputs, options, phases, anew)
    except (CaptureError, UnsupportedError) as error:
        if options.cache_named:
            raise
        note = f"compiled as a plain module, not as a causal LM: {error}"
    return _compile_module(source, inputs, options, phases, (note,))


def backend_rivals(model: object, options: CompileOptions, phases: Phases) -> Rivals | None:
    """The backends that a causal LM may have; None where there is no choice (the options name one)
    or the model is none. Errors as `compile` has them.
    """
    source = phases.run("open", 0.0, lambda: open_model(model, options))
    check_stored(source, options)
    if not options.rivals or not source.is_causal_lm or options.cache is None:
        return None
    lowered = _lowered_lm(source, Inputs(None, None), options, phases)
    return lowered.rivals(options, lambda of: _compiled(model, None, None, of, Phases()))


def _compile_lm(
    source: Source, inputs: Inputs, options: CompileOptions, phases: Phases, anew: Make
) -> EngineImage:
    """``anew`` compiles the model from its beginning, for another backend."""
    from .backend_choice import choose_backend  # brings the templates, and with them Triton

    lowered = _lowered_lm(source, inputs, options, phases)
    rivals = lowered.rivals(options, anew) if options.rivals else None
    choice = phases.run("choose", 0.41, lambda: choose_backend(rivals, options))
    image = choice.image or lowered.compiled(options, phases)
    return replace(image, report={**image.report, "backend": choice.facts})


@dataclass(frozen=True, slots=True)
class _LoweredLM:
    """A causal LM before passes: the same for all backends, unless they read its weights otherwise.

    Attributes:
        source, captured: the model.
        graph: of it.
        limit: longest sequence.
    """

    source: Source
    captured: Captured
    graph: Graph
    limit: int

    def compiled(self, options: CompileOptions, phases: Phases) -> EngineImage:
        source, graph, limit = self.source, self.graph, self.limit
        ids = sample_ids(graph, limit)
        image, final = _finish(source, self.captured, graph, options, phases, (ids,), limit)
        lm = _lm_config(source, options, final, limit)
        return replace(image, lm=lm, tokenizer=source_tokenizer(source))

    def rivals(self, options: CompileOptions, anew: Make) -> Rivals:
        """Who may compile it, from here on where that gives the same."""

        def make(other: CompileOptions) -> EngineImage:
            in_codes = self.source.kind == "gguf" and keeps_codes(other) != keeps_codes(options)
            if in_codes or other.dtype != options.dtype:
                return anew(other)
            return self.compiled(other, Phases())

        return Rivals.of(self.graph, options, self.limit, make)


def _lowered_lm(
    source: Source, inputs: Inputs, options: CompileOptions, phases: Phases
) -> _LoweredLM:
    captured = phases.run("capture", 0.05, lambda: _capture_lm(source, inputs))
    captured = replace(captured, notes=(*captured.notes, *source.notes))
    longest = source.max_position_embeddings
    name = identifier(source.name)
    if source.is_causal_lm:
        graph = phases.run("lower", 0.4, lambda: lower(captured, name, source.weights))
    else:
        graph, found = phases.run(
            "lower", 0.4, lambda: lower_module_lm(captured, name, source.weights)
        )
        longest = min((n for n in (found, longest) if n is not None), default=None)
    return _LoweredLM(source, captured, graph, context_of(longest, options))


def _compile_module(
    source: Source,
    inputs: Inputs,
    options: CompileOptions,
    phases: Phases,
    notes: tuple[str, ...] = (),
) -> EngineImage:
    captured = phases.run("capture", 0.05, lambda: _capture_plain(source, inputs))
    captured = replace(captured, notes=(*captured.notes, *source.notes, *notes))
    graph = phases.run(
        "lower", 0.4, lambda: lower(captured, identifier(source.name), source.weights)
    )
    samples = _samples(captured, graph, inputs.examples)
    image, _ = _finish(source, captured, graph, options, phases, samples, None)
    return replace(image, signature=_signature(captured))


def _finish(
    source: Source,
    captured: Captured,
    graph: Graph,
    options: CompileOptions,
    phases: Phases,
    samples: tuple[torch.Tensor, ...],
    limit: int | None,
) -> tuple[EngineImage, Graph]:
    """Passes and codegen: the image without its interface, and the last graph. ``limit`` is a
    causal LM's context.
    """
    cache = None if limit is None else options.cache
    backend = get_backend(options.backend)
    heads, recipe = phases.run(
        "calibrate", 0.41, lambda: make_changes(graph, source, options, limit)
    )
    checks = Checks(source, options, backend, limit, recipe, heads)
    if effort_of(options.tune).measures and backend.own_kernels and not options.deterministic:
        phases.run(
            "tune", 0.42, lambda: _tune(graph, cache, backend, options, limit, recipe, heads)
        )
    phases.run("verify", 0.45, checks.on_one_of_each_layer)
    passed = phases.run(
        "passes",
        0.6,
        lambda: changed_graphs(
            graph, cache, backend, checks.level, samples, options, recipe, heads
        ),
    )
    lowered = phases.run(
        "codegen",
        0.75,
        lambda: lowered_graphs(passed, backend, options, limit),
    )
    checks.strictly(lowered)
    phases.run("check", 0.85, lambda: checks.of_programs(passed, lowered, samples))
    quality, fewer = phases.run(
        "assess",
        0.87,
        lambda: costs_of(graph, source, recipe, limit, heads, phases.within("assess", 0.87, 1.0)),
    )
    final, general = passed.final, lowered.general
    image = EngineImage(
        graph.name,
        "module" if limit is None else "causal_lm",
        str(options.target),
        options.backend,
        general.program,
        lowered.files,
        {name: weight for name, weight in final.weights.items() if name in lowered.weights},
        _texts(graph, passed.records),
        make_report(
            source,
            captured,
            passed,
            lowered,
            phases.seconds,
            checks.largest_error,
            recipe,
            quality,
            fewer,
        ),
        decode=_decode_part(passed, lowered),
    )
    return image, final


def _decode_part(passed: Passed, lowered: LoweredGraphs) -> DecodePart | None:
    if lowered.decode is None:
        return None
    return DecodePart(lowered.decode.program, _texts(passed.fork, passed.decode_records))


def _tune(
    graph: Graph,
    cache: CacheKind,
    backend: Backend,
    options: CompileOptions,
    limit: int | None,
    recipe: Recipe | None,
    heads: HeadPlan | None,
) -> None:
    """Measures what the store does not know of the kernels of all graphs."""
    from .tuning import tune_graphs  # brings the templates, and with them Triton

    passed = changed_graphs(graph, cache, backend, "off", None, options, recipe, heads)
    tune_graphs(passed.decode, passed.final, options, limit)


def _capture_lm(source: Source, inputs: Inputs) -> Captured:
    if source.is_causal_lm:
        return capture_causal_lm(source.module)
    assert inputs.examples is not None
    return capture_module_lm(source.module, inputs.examples)


def _capture_plain(source: Source, inputs: Inputs) -> Captured:
    if inputs.examples is not None:
        return capture_module(source.module, inputs.examples, inputs.dynamic_shapes)
    if source.is_causal_lm:
        return capture_causal_lm(source.module)
    raise UsageError(
        "example_inputs",
        expected="a tuple or dict of tensors, to capture a plain nn.Module with",
        found="None",
        remedy="Call tilewright.compile(module, (tensor, …)).",
    )


def _samples(
    captured: Captured, graph: Graph, example_inputs: Examples | None
) -> tuple[torch.Tensor, ...]:
    """One tensor an input of the graph, to compare graphs on."""
    if example_inputs is None:
        return (sample_ids(graph, DEFAULT_CONTEXT),)
    args, kwargs = (
        ((), example_inputs) if isinstance(example_inputs, Mapping) else (example_inputs, {})
    )
    found = flatten(captured.call, (tuple(args), dict(kwargs)))
    return tuple(found[index] for index in range(len(captured.inputs)))


def sample_ids(graph: Graph, limit: int) -> torch.Tensor:
    """Token ids i64[1, S] for a causal LM, whose vocabulary is that of its logits."""
    vocab = int(str(graph.outputs[0].shape[-1]))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (1, min(8, limit)), generator=generator)


def _lm_config(source: Source, options: CompileOptions, graph: Graph, limit: int) -> LMConfig:
    assert options.cache is not None
    logits = graph.outputs[0].shape[-1]
    return LMConfig(
        int(str(logits)),
        limit,
        options.max_batch_size,
        options.page_size,
        options.cache,
        source.eos_token_ids,
        options.memory_fraction,
        options.prefix_caching,
        options.swap_space,
        window=None if options.window is None else options.window.size,
        sinks=0 if options.window is None else options.window.sinks,
    )


def _signature(captured: Captured) -> Signature:
    return Signature(
        captured.call,
        captured.arguments,
        output_structure(captured),
        tuple(entry.path for entry in captured.inputs),
        tuple((name, *limits) for name, limits in Sizes.of(captured.symbols).ranges.items()),
    )


def _texts(graph: Graph, records: list[PassRecord]) -> tuple[tuple[str, str], ...]:
    return (("captured", str(graph)), *((r.name, str(r.graph)) for r in records))


def identifier(name: str) -> str:
    """A name for a graph, from that of a model."""
    text = re.sub(r"\W+", "_", Path(name).stem).strip("_").lower()
    return text if is_name(text) else f"model_{text}"


__all__ = [
    "CausalLMEngine",
    "Engine",
    "ModuleEngine",
    "Phases",
    "Progress",
    "compile",
    "compile_image",
]

"""``tilewright compile``: from a checkpoint to an engine folder, or a model for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import out, print_json, progress
from .emit import check_emission, emit_engine, emit_model
from .options import (
    AttentionOption,
    BackendOption,
    BatchOption,
    CacheDtypeOption,
    CacheOption,
    ContextOption,
    DecodeOption,
    DeterministicOption,
    DtypeOption,
    JsonOption,
    MemoryOption,
    Model,
    QuantizeOption,
    RandomOption,
    SinksOption,
    TargetOption,
    TuneOption,
    VerifyOption,
    WeightsOption,
    WindowOption,
    check_place,
    compile_in_memory,
)

if TYPE_CHECKING:
    from ...runtime.image import EngineImage


def compile_model(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)
    ],
    target: TargetOption = "auto",
    backend: BackendOption = "auto",
    quantize: QuantizeOption = None,
    attention: AttentionOption = None,
    kv_cache: CacheOption = "auto",
    kv_cache_dtype: CacheDtypeOption = "auto",
    window: WindowOption = None,
    sinks: SinksOption = 4,
    dtype: DtypeOption = "auto",
    max_model_len: ContextOption = None,
    max_batch_size: BatchOption = None,
    verify: VerifyOption = "sample",
    trust_remote_code: Annotated[
        bool, typer.Option(help="Let the model folder bring Python code of its own.")
    ] = False,
    weights: WeightsOption = "embed",
    random_weights: RandomOption = None,
    deterministic: DeterministicOption = False,
    memory_fraction: MemoryOption = 0.9,
    tune: TuneOption = "cached",
    decode: DecodeOption = "auto",
    emit: Annotated[
        str | None,
        typer.Option(
            metavar="onnx|tensorrt",
            help="Write a model for other runtimes instead of an engine.",
            show_default=False,
        ),
    ] = None,
    flavor: Annotated[
        str | None,
        typer.Option(
            help="Of --emit onnx: standard, or onnxruntime for its own ops where they are faster.",
            show_default="standard",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(help="Refuse what the backend leaves to torch, or attention by parts."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compile MODEL into an engine folder, or with --emit into a model for other runtimes."""
    of_engines: dict[str, Any] = {"target": target, "backend": backend, "kv_cache": kv_cache}
    of_engines |= {"kv_cache_dtype": kv_cache_dtype, "tune": tune, "decode": decode}
    of_engines |= {"max_batch_size": max_batch_size, "deterministic": deterministic}
    of_engines |= {"memory_fraction": memory_fraction, "window": window, "sinks": sinks}
    of_both: dict[str, Any] = {"quantize": quantize, "attention": attention, "verify": verify}
    of_both |= {"max_model_len": max_model_len, "random_weights": random_weights}
    of_both |= {"trust_remote_code": trust_remote_code, "dtype": dtype}
    if emit is not None or flavor is not None:
        check_emission(emit, flavor, strict, output, {**of_engines, "weights": weights})
        if emit == "tensorrt":
            of_tensorrt = {"targets": target, "max_batch_size": max_batch_size, "strict": strict}
            emit_engine(model, output, {**of_both, **of_tensorrt}, as_json)
            return
        emit_model(model, output, flavor or "standard", of_both, as_json)
        return
    from ...runtime.folder import check_form, save_engine

    check_place(output)
    check_form(weights)
    image = compile_in_memory(model, **of_engines, **of_both, strict=strict)
    with progress(f"save {output.name}") as advance:
        advance("writing weights", 0.0)
        save_engine(image, output, weights)
    if as_json:
        print_json({"engine": str(output), "report": dict(image.report), **_facts(image)})
    else:
        _print_summary(image, output)


def _facts(image: EngineImage) -> dict[str, object]:
    return {
        "name": image.name,
        "kind": image.kind,
        "target": image.target,
        "backend": image.backend,
    }


def _print_summary(image: EngineImage, output: Path) -> None:
    from ..heads.table import heads_tables
    from ..inspect.facts import fallback_lines, headline
    from .tables import facts_table

    console = out()
    console.print(facts_table(headline(image)))
    if isinstance(heads := image.report.get("attention"), dict):
        for table in heads_tables(heads):
            console.print(table)
    for line in fallback_lines(image):
        console.print(f"  note: {line}", style="yellow", markup=False)
    console.print(f'engine written; try: tilewright generate {output} "Hello"', markup=False)

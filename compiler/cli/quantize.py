"""``tilewright quantize``: a quantized engine or folder, and what it cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from .console import out, print_json, progress
from .options import (
    AttentionOption,
    BackendOption,
    BatchOption,
    CacheDtypeOption,
    ContextOption,
    DtypeOption,
    JsonOption,
    Model,
    TargetOption,
    VerifyOption,
    WeightsOption,
    check_model,
    check_place,
    compile_in_memory,
)

if TYPE_CHECKING:
    from ...passes.schemes import QuantConfig
    from ...runtime.image import EngineImage


FORMATS = ("engine", "compressed-tensors")

OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Folder to write; without it the quality is measured and nothing written.",
        show_default=False,
    ),
]
SchemeOption = Annotated[
    str,
    typer.Option(
        help="int8-weight, int8, fp8, fp8-tensor, fp8-block, fp8-weight or int4; stored for the "
        "codes that MODEL has.",
        show_default=False,
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(help="rtn, gptq, awq or smoothquant; by default the scheme's own."),
]
GroupOption = Annotated[
    int | None, typer.Option(help="Columns that share a scale; 0 is a whole row.")
]
ZeroOption = Annotated[bool, typer.Option("--asymmetric", help="Give each group a zero point.")]
SkipOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Weights to keep, e.g. '*.down_proj.*'."),
]
HeadOption = Annotated[bool, typer.Option("--lm-head", help="Quantize the last product too.")]
ComputeOption = Annotated[
    str,
    typer.Option(help="float, or int8: activations may be rounded, where that is faster."),
]
CalibrateOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text to calibrate with.", show_default=False)
]
ReportOption = Annotated[
    bool, typer.Option("--report", help="Measure perplexity, divergence and layers' errors.")
]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        help="engine, or compressed-tensors: a Hugging Face folder that others load. That takes "
        "no options of engines.",
    ),
]
SensitivityOption = Annotated[
    bool,
    typer.Option(
        "--sensitivity",
        help="Measure what each linear costs alone, and name those to --skip. Means --report.",
    ),
]
TextOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text to measure on.", show_default=False)
]


def quantize_model(
    model: Model,
    scheme: SchemeOption,
    output: OutputOption = None,
    method: MethodOption = None,
    group: GroupOption = None,
    asymmetric: ZeroOption = False,
    skip: SkipOption = None,
    lm_head: HeadOption = False,
    compute: ComputeOption = "float",
    calibrate: CalibrateOption = None,
    report: ReportOption = False,
    text: TextOption = None,
    sensitivity: SensitivityOption = False,
    tokens: Annotated[int, typer.Option(help="Tokens of it to measure on at most.")] = 4096,
    seed: Annotated[int, typer.Option(help="Picks the samples to calibrate with.")] = 0,
    attention: AttentionOption = None,
    target: TargetOption = "auto",
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: ContextOption = None,
    max_batch_size: BatchOption = None,
    kv_cache_dtype: CacheDtypeOption = "auto",
    verify: VerifyOption = "sample",
    weights: WeightsOption = "embed",
    form: FormatOption = "engine",
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL into an engine, or into a folder for others, and say what it costs."""
    from ...passes.heads import resolve_heads
    from ...passes.schemes import QuantConfig
    from ...runtime.folder import check_form, save_engine
    from ..options import wrong_option

    check_form(weights)
    measures = report or sensitivity or text is not None
    _check_output(output, measures, form)
    if form not in FORMATS:
        raise wrong_option("format", form, FORMATS)
    config = QuantConfig(
        scheme,
        group,
        not asymmetric,
        method,
        tuple(skip or ()),
        lm_head,
        calibrate,
        seed=seed,
        report=measures,
        report_text=text,
        report_tokens=tokens,
        compute=compute,
        sensitivity=sensitivity,
    )
    fewer = resolve_heads(attention)
    if fewer is not None and config.report:
        fewer = replace(fewer, report=True, report_text=text, report_tokens=tokens)
    if output is not None and form != "engine":
        _refuse_heads(attention)
        _export(model, output, config, as_json)
        return
    image = compile_in_memory(
        model,
        target=target,
        backend=backend,
        quantize=config,
        kv_cache_dtype=kv_cache_dtype,
        attention=fewer,
        dtype=dtype,
        max_model_len=max_model_len,
        max_batch_size=max_batch_size,
        verify=verify,
    )
    if output is not None:
        with progress(f"save {output.name}") as advance:
            advance("writing weights", 0.0)
            save_engine(image, output, weights)
    _print(image, output, as_json)


def _refuse_heads(attention: str | None) -> None:
    if attention is not None:
        raise UsageError(
            f"option --attention {attention}",
            expected="an engine to write: --format engine",
            found="a folder for others",
            remedy="Convert the heads first, with compiler.convert_heads.export_gqa.",
        )


def _check_output(output: Path | None, measures: bool, form: str) -> None:
    if output is not None:
        check_place(output)
    elif not measures or form != "engine":
        raise UsageError(
            "option --output",
            expected="a folder to write, or --report or --sensitivity to measure alone",
            found="none",
            remedy="Add -o FOLDER, or --report without --format.",
        )


def _export(model: str, output: Path, config: QuantConfig, as_json: bool) -> None:
    from ..export_quantized import export_quantized

    model = check_model(model).path
    with progress(f"quantize {Path(model).name}") as advance:
        advance("quantizing", 0.0)
        facts = export_quantized(model, output, config)
    if as_json:
        print_json({"folder": str(output), "quantization": facts})
        return
    console = out()
    console.print(
        f"{facts['linears']} linears in {facts['scheme']} ({facts['method']}), {facts['format']}"
    )
    if isinstance(quality := facts["quality"], dict):
        console.print(
            f"perplexity {quality['perplexity']:.3f}, was {quality['base_perplexity']:.3f}"
        )
    console.print(f"folder written: {output}", markup=False)


def _print(image: EngineImage, output: Path | None, as_json: bool) -> None:
    facts, stored = image.report["quantization"], image.report["stored_quantization"]
    heads = image.report.get("attention")
    if as_json:
        own = {"quantization": facts} if facts else {"stored_quantization": stored}
        more = {} if heads is None else {"attention": heads}
        print_json({"engine": None if output is None else str(output), **own, **more})
        return
    from rich.text import Text

    from ..heads.table import heads_tables
    from ..quality.table import quantization_tables

    console = out()
    if isinstance(facts, dict):
        for part in quantization_tables(facts):
            console.print(part, soft_wrap=isinstance(part, Text))
    elif isinstance(stored, dict):
        console.print(f"{stored['linears']} linears keep the codes of {stored['method']}")
    if isinstance(heads, dict):
        for table in heads_tables(heads):
            console.print(table)
    if output is not None:
        console.print(f'engine written; try: tilewright generate {output} "Hello"', markup=False)

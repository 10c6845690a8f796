"""``tilewright inspect``: what is in an engine, as text, JSON or one HTML page."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from .console import note, out, print_json, progress
from .options import (
    BackendOption,
    CheckpointOption,
    ContextOption,
    EngineOrModel,
    JsonOption,
    open_image,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ...runtime.image import EngineImage


def inspect_engine(
    engine: EngineOrModel,
    html: Annotated[
        Path | None, typer.Option(help="Write one self-contained page there.", show_default=False)
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="A step of one launch for all layers, for the page to show.", show_default=False
        ),
    ] = None,
    graph: Annotated[
        str | None,
        typer.Option("--pass", help="Print the graph after this pass (number or name)."),
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Print what changed between two passes.", show_default=False),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(help="Print the source and facts of this kernel.", show_default=False),
    ] = None,
    backend: BackendOption = "auto",
    max_model_len: ContextOption = None,
    checkpoint: CheckpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the passes, graphs, kernels, sizes and memory plan of ENGINE."""
    from ..inspect.facts import pick_pass

    if trace is not None and html is None:
        raise UsageError(
            "option --trace",
            expected="--html, whose page shows it",
            found="none",
            remedy="Add --html FILE.",
        )
    image = open_image(engine, backend, max_model_len, checkpoint=checkpoint)
    if graph is not None:
        print(pick_pass(image, graph)[1], end="")
        return
    if diff is not None:
        _print_diff(pick_pass(image, diff[0]), pick_pass(image, diff[1]))
        return
    if kernel is not None:
        _print_kernel(image, kernel, as_json)
        return
    if html is not None:
        _write_page(image, html, trace, Path(engine).name)
    if as_json:
        from ..inspect.text import as_data

        print_json(as_data(image))
    elif html is None:
        _print_all(image, out())


def _write_page(image: EngineImage, html: Path, trace: Path | None, name: str) -> None:
    from ...codegen.persistent.trace import read_trace
    from ...formats.atomic import write_atomic
    from ..inspect.html import render_page

    step = None if trace is None else read_trace(trace)
    with progress(f"inspect {name}") as advance:
        advance("drawing", 0.1)
        page = render_page(image, step)
    write_atomic(html, page)
    note(f"wrote {html} ({len(page.encode()) / 1e6:.1f} MB)")


def _print_diff(before: tuple[str, str], after: tuple[str, str]) -> None:
    lines = difflib.unified_diff(
        before[1].splitlines(), after[1].splitlines(), before[0], after[0], lineterm="", n=2
    )
    for line in lines:
        print(line)


def _print_kernel(image: EngineImage, wanted: str, as_json: bool) -> None:
    from ...targets import Target
    from ..inspect.kernel_view import kernel_data, kernel_lines
    from ..inspect.kernels import kernel_report, pick_kernel
    from ..inspect.text import parts, settings
    from .tables import facts_table

    target = Target.parse(image.target)
    reports = [kernel_report(part, chosen) for part, chosen in parts(image)]
    named = {kernel.name: kernel for report in reports[::-1] for kernel in report.kernels}
    found = pick_kernel([*named.values()], wanted)
    chosen = [setting for setting in settings(image) if setting.name in found.steps]
    if as_json:
        print_json(kernel_data(found, target))
        return
    out().print(facts_table(kernel_lines(found, target, chosen)))
    print()
    if found.package is not None:
        print(found.package.source.text, end="")
    else:
        print("No source: the kernel is a library's, or torch's.")


def _print_all(image: EngineImage, console: Console) -> None:
    from rich.text import Text

    from ..inspect.facts import fallback_lines, headline
    from ..inspect.text import sections
    from ..quality.table import quantization_tables
    from .tables import facts_table, plain_table

    console.print(facts_table(headline(image)))
    if isinstance(quantized := image.report.get("quantization"), dict):
        console.print()
        for part in quantization_tables(quantized):
            console.print(part, soft_wrap=isinstance(part, Text))
    for section in sections(image):
        console.print()
        table = plain_table(section.columns, section.title, section.left)
        table.columns[0].overflow = "fold"  # names are shown whole: --kernel takes them
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
        if section.footnote:
            console.print(section.footnote, style="dim", markup=False)
    lines = fallback_lines(image)
    console.print()
    console.print("Notes and fallbacks", style="bold italic")
    for line in lines or ["none: every call runs in the backend"]:
        console.print(f"  {line}", markup=False)

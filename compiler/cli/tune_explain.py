"""``tilewright tune explain``: what the store has for an engine's problems, or for a kernel's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError
from .console import note, out, print_json
from .options import (
    BackendOption,
    BatchOption,
    ContextOption,
    DtypeOption,
    JsonOption,
    RandomOption,
    TargetOption,
)
from .tune_backend import parted, rivals_of
from .tune_options import OnlyOption, chosen, image_of

if TYPE_CHECKING:
    from ...autotune.lookup import Found


def explain(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="ENGINE|KERNEL",
            help="An engine folder or a model; or a kernel: linear_gemv, linear_gemm or "
            "paged_decode. Such a name is never a path: write ./linear_gemm for a folder.",
            show_default=False,
        ),
    ],
    shape: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SHAPE",
            help='Of a KERNEL: facts of its problems, any of them, as "k=4096 n=6144 tokens=16".',
            show_default=False,
        ),
    ] = None,
    target: TargetOption = "auto",
    only: OnlyOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: ContextOption = None,
    max_batch_size: BatchOption = None,
    random_weights: RandomOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what the store has for each problem, or which field of the key differs.

    Of ENGINE: the problems of its kernels. Of KERNEL: those in the store that have SHAPE's
    facts, looked up for --target; for auto without a GPU, for the device of each record.
    """
    model: Mapping[str, object] = {
        "backend": None if backend == "auto" else backend,
        "dtype": None if dtype == "auto" else dtype,
        "max-model-len": max_model_len,
        "max-batch-size": max_batch_size,
        "random-weights": random_weights,
    }
    if _is_kernel(subject, shape):
        _refuse(subject, {**model, "only": only})
        found = _of_kernel(subject, " ".join(shape or ()), target)
    else:
        given = {name.replace("-", "_"): value for name, value in model.items()}
        found = _of_model(subject, only, {**given, "backend": backend, "dtype": dtype}, target)
    _print(found, as_json)


def _of_model(
    subject: str, only: str | None, model: Mapping[str, Any], target: str
) -> Sequence[Found]:
    """Of the kernels of an engine or a model, behind them of its decode steps and its backend."""
    from ...autotune.lookup import lookup
    from ..backend_choice import conditions_here
    from ..tuning import looked_up, problems_of_image, tuning_store
    from .tune_steps import problems_of_steps

    parts = parted(only)
    rivals = None
    if parts.backend:
        rivals = rivals_of(subject, target=target, quantize=None, **model)
    found: list[Found] = []
    if rivals is None or (rivals.has_kernels and parts.on_gpu):
        image = image_of(subject, target=target, **model)
        found += looked_up(chosen(problems_of_image(image), parts.kernels), tuning_store())
        if parts.steps:
            found += looked_up(problems_of_steps(image, parts.named), tuning_store())
    if rivals is not None:
        found.append(lookup(tuning_store(), rivals.key, conditions_here()))
    return found


def _is_kernel(subject: str, shape: Sequence[str] | None) -> bool:
    """Which of the two forms it is: a template's name is a kernel, all else has to be a path."""
    from ...codegen.triton.tuning.registry import TEMPLATES

    names = [template.name for template in TEMPLATES]
    if subject in names:
        return True
    there = Path(subject).exists()
    if there and not shape:
        return False
    raise UsageError(
        subject,
        expected=f"a kernel ({', '.join(names)})"
        + (", as a SHAPE follows" if shape else ", an engine folder or a model"),
        found="a path, which has no SHAPE" if there else "no such kernel, and nothing at that path",
        remedy="Name one of these kernels, or an engine alone.",
    )


def _refuse(subject: str, options: Mapping[str, object]) -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(
                f"option --{name}",
                expected=f"it beside an engine or a model, not beside the kernel {subject}",
                found=str(value),
                remedy="Give what you look for as a fact: tilewright tune explain linear_gemm "
                '"dtype=bf16 tokens=16".',
            )


def _of_kernel(name: str, shape: str, target: str) -> Sequence[Found]:
    from ...autotune.problem_facts import ask, parse_facts
    from ...codegen.triton.tuning.conditions import conditions_here
    from ...codegen.triton.tuning.registry import template_named
    from ...targets import Target
    from ..tuning import tuning_store

    wanted = Target.detect() if target == "auto" else Target.parse(target)
    nowhere = target == "auto" and wanted.is_cpu
    found = ask(
        tuning_store(),
        name,
        parse_facts(shape),
        template_hash=template_named(name).code_hash,
        device=None if nowhere else (str(wanted), wanted.arch),
        conditions=conditions_here(driver=True),
    )
    if not found:
        note(f"{name}: miss, the store holds no records of this kernel")
    return found


def _print(found: Sequence[Found], as_json: bool) -> None:
    from ...autotune.lookup import explain as explained

    if as_json:
        print_json([one.to_json() for one in found])
        return
    for one in found:
        out().print(explained(one), soft_wrap=True, markup=False)

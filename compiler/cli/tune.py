"""``tilewright tune …``: the fastest configs of a model's kernels, measured on this device."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ...errors import UnsupportedError
from .console import INTERRUPTED, note, out, print_json
from .options import (
    BackendOption,
    BatchOption,
    ContextOption,
    DtypeOption,
    EngineOrModel,
    JsonOption,
    QuantizeOption,
    RandomOption,
    TargetOption,
)
from .tune_backend import BACKEND, no_choice, parted, rivals_of, tune_rivals
from .tune_confirm import AgainstOption, BatchesOption, Confirmation, ConfirmOption
from .tune_explain import explain
from .tune_options import OnlyOption, StorageOption, chosen, image_of
from .tune_report import report
from .tune_steps import tune_steps_of

if TYPE_CHECKING:
    from ...autotune.effort import Effort, TuneConfig
    from ...codegen.triton.tuning.tunable import KernelTunable
    from ...runtime.image import EngineImage
    from ...targets import Target
    from ..confirm import Confirmed
    from ..tuning import TunedProblem


class _RunByDefault(TyperGroup):
    """``tilewright tune MODEL`` is ``tilewright tune run MODEL``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().resolve_command(ctx, args)


tune_app = typer.Typer(
    cls=_RunByDefault,
    help="Measure which configs of a model's kernels, and which backend, are the fastest here.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

EffortOption = Annotated[
    str, typer.Option(help="quick (24 configs a problem at most), full, cached or none.")
]


@tune_app.command("run")
def run(
    engine: EngineOrModel,
    target: TargetOption = "auto",
    effort: EffortOption = "quick",
    trials: Annotated[
        int | None,
        typer.Option(help="Configs of each problem at most; all else as --effort says."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="For everything; what is not reached is listed, and left as it is."),
    ] = None,
    only: OnlyOption = None,
    storage: StorageOption = None,
    seed: Annotated[int, typer.Option(help="Of the sampler of full.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take up what ended processes left in --storage.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Measure also what the store knows already.")
    ] = False,
    confirm: ConfirmOption = False,
    against: AgainstOption = "defaults",
    batch: BatchesOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    max_model_len: ContextOption = None,
    max_batch_size: BatchOption = None,
    random_weights: RandomOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tune ENGINE's kernels, choose whether decode steps are one launch, and keep what was found
    for later compiles. Of a model whose backend is left open: which backend is the fastest, too.

    Ctrl-C keeps what was found; the same command goes on from there. Exit code 1: --confirm found a
    decode step that got slower.
    """
    from ...autotune.effort import TuneConfig, effort_of
    from ...autotune.study import open_storage
    from ..tuning import problems_of_image

    budget = TuneConfig(trials, seconds, storage, seed)  # refuses what is no budget
    spent = effort_of(effort).limited(budget.trials, budget.seconds)
    if storage is not None and spent.measures:
        open_storage(storage)  # what does not answer is said before minutes of compilation
    model: dict[str, Any] = {"target": target, "backend": backend, "dtype": dtype}
    model |= {"quantize": quantize, "max_model_len": max_model_len}
    model |= {"max_batch_size": max_batch_size, "random_weights": random_weights}
    parts = parted(only)
    rivals = rivals_of(engine, **model) if parts.backend else None
    if only == BACKEND and rivals is None:
        raise no_choice(engine, backend)
    if rivals is not None and spent.measures:
        _check_device(rivals.target)
    named = parts.named and parts.steps  # which must be there
    needed = rivals is None or confirm or named or (rivals.has_kernels and parts.on_gpu)
    image = _image(engine, model, spent.measures or confirm) if needed else None
    problems = () if image is None else problems_of_image(image)
    confirmation = Confirmation(image, against, batch) if image is not None and confirm else None
    started = time.monotonic()
    ends = None if seconds is None else started + seconds
    how, wanted = {"resume": resume, "again": again}, chosen(problems, parts.kernels)
    done, interrupted = _tuned(wanted, spent, budget, **how)
    if image is not None and parts.steps:
        done, interrupted = tune_steps_of(
            image, spent, budget, ends, done, interrupted, named=parts.named, **how
        )
    if rivals is not None:
        one, stopped = tune_rivals(rivals, spent, budget, ends, stopped=interrupted, **how)
        done, interrupted = [*done, one], interrupted or stopped
    took = time.monotonic() - started
    confirmed = None if confirmation is None or interrupted else confirmation.run(problems)
    _tell(done, took, confirmed, as_json)
    if interrupted:
        _tell_interrupted(done, storage)
        raise typer.Exit(INTERRUPTED)
    if confirmed is not None and confirmed.is_slower:
        raise typer.Exit(1)


def _image(engine: str, model: Mapping[str, Any], measures: bool) -> EngineImage:
    """The engine whose kernels are tuned; it has to run here where something is measured."""
    from ...targets import Target

    image = image_of(engine, **model)
    if measures:
        _check_device(Target.parse(image.target), of_kernels=True)
    return image


def _tuned(
    problems: Sequence[KernelTunable],
    effort: Effort,
    budget: TuneConfig,
    *,
    resume: bool,
    again: bool,
) -> tuple[list[TunedProblem], bool]:
    """What became of the problems, all of them, and whether Ctrl-C ended it."""
    from ..tuning import TunedProblem, tune_all, tuning_store
    from .tune_view import bars

    done: list[TunedProblem] = []
    interrupted = False
    with bars(len(problems), budget.seconds) as advance:
        searches = tune_all(
            problems,
            effort,
            tuning_store(),
            again=again,
            storage=budget.storage,
            seed=budget.seed,
            resume=resume,
            seconds=budget.seconds,
            progress=advance,
        )
        try:
            for found in searches:
                done.append(found)
                advance(found.tunable, None)
                interrupted |= found.tuned is not None and found.tuned.interrupted
        except KeyboardInterrupt:  # between two searches, or in the compilation before one
            interrupted = True
    rest = problems[len(done) :]
    return [*done, *(TunedProblem(tunable, None, None) for tunable in rest)], interrupted


def _check_device(wanted: Target, *, of_kernels: bool = False) -> None:
    """Whether what is measured can run here: kernels on a GPU, backends on any device."""
    from ...targets import Target

    here = Target.detect()
    if (here.arch != wanted.arch and not wanted.is_cpu) or (of_kernels and wanted.is_cpu):
        raise UnsupportedError(
            f"tuning for {wanted.name}",
            expected=f"a GPU of {wanted.sm} in this machine: configs are measured",
            found=here.name,
            remedy="Run it there. Its records (tuning.jsonl in the cache) can be merged here.",
        )


def _tell(
    done: Sequence[TunedProblem], took: float, confirmed: Confirmed | None, as_json: bool
) -> None:
    from .tune_confirm import print_confirmed
    from .tune_view import print_tuned, print_unreached, tuned_data

    if as_json:
        problems = [tuned_data(number, one) for number, one in enumerate(done, start=1)]
        if confirmed is None:
            print_json(problems)
        else:
            print_json({"problems": problems, "confirmed": confirmed.to_json()})
    else:
        print_tuned(done, took)
        if confirmed is not None:
            print_confirmed(confirmed)
    print_unreached(done)


def _tell_interrupted(done: Sequence[TunedProblem], storage: str | None) -> None:
    kept = sum(one.record is not None for one in done)
    on = "the same command goes on"
    if storage is not None:
        on = f"tilewright tune … --storage {storage} --resume goes on within the search"
    note(f"interrupted: {kept} of {len(done)} problems are in the store; {on}")


@tune_app.command("merge")
def merge(
    records: Annotated[
        list[Path], typer.Argument(help="Files of records.", exists=True, dir_okay=False)
    ],
    into: Annotated[
        Path | None, typer.Option(help="File to merge into; by default the store of this user.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Merge RECORDS of other machines: of one problem and its conditions the newest is kept."""
    from ...autotune.merge import merge as merge_records
    from ..tuning import tuning_store

    into = into or tuning_store().path
    into.parent.mkdir(parents=True, exist_ok=True)
    merged = merge_records([str(path) for path in records], str(into))
    if as_json:
        print_json({"into": str(into), "read": merged.read, "kept": merged.kept})
        return
    out().print(f"{merged.read} records read, {into} has {merged.kept}", soft_wrap=True)
    if merged.damaged:
        note(f"{merged.damaged} damaged lines were left out")


tune_app.command("explain")(explain)
tune_app.command("report")(report)

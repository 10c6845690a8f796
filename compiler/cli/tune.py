"""``tilewright tune …``: the fastest configs of a model's kernels, measured on this device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ...errors import UnsupportedError
from .console import err, note, out, print_json
from .options import (
    BackendOption,
    BatchOption,
    ContextOption,
    DtypeOption,
    EngineOrModel,
    JsonOption,
    RandomOption,
    TargetOption,
)
from .tune_explain import explain
from .tune_options import OnlyOption, StorageOption, chosen, image_of

if TYPE_CHECKING:
    from ...autotune.search import Progress
    from ...codegen.triton.tuning.tunable import KernelTunable
    from ..tuning import TunedProblem


class _RunByDefault(TyperGroup):
    """``tilewright tune MODEL`` is ``tilewright tune run MODEL``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().resolve_command(ctx, args)


tune_app = typer.Typer(
    cls=_RunByDefault,
    help="Measure which configs of a model's kernels are the fastest on this device.",
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
    trials: Annotated[int | None, typer.Option(help="Configs of each problem at most.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time for everything at most.")] = None,
    only: OnlyOption = None,
    storage: StorageOption = None,
    seed: Annotated[int, typer.Option(help="Of the sampler of full.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take up what ended processes left in --storage.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Measure also what the store knows already.")
    ] = False,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: ContextOption = None,
    max_batch_size: BatchOption = None,
    random_weights: RandomOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tune the kernels of ENGINE's decode steps, and keep what was found for later compiles."""
    from ...autotune.effort import TuneConfig, effort_of
    from ...targets import Target
    from ..tuning import problems_of_image, tune_all, tuning_store

    spent = effort_of(effort)
    if trials is not None:
        spent = effort_of(TuneConfig(trials=trials, seconds=seconds, storage=storage, seed=seed))
    image = image_of(
        engine,
        target=target,
        backend=backend,
        dtype=dtype,
        max_model_len=max_model_len,
        max_batch_size=max_batch_size,
        random_weights=random_weights,
    )
    wanted = Target.parse(image.target)
    if Target.detect().arch != wanted.arch or wanted.is_cpu:
        raise UnsupportedError(
            f"tuning for {wanted.name}",
            expected=f"a GPU of {wanted.sm} in this machine: configs are measured",
            found=f"{Target.detect().name}",
            remedy="Run it there. Its records (tuning.jsonl in the cache) can be merged here.",
        )
    problems = chosen(problems_of_image(image), only)
    with _bars(len(problems)) as advance:
        done = []
        searches = tune_all(
            problems,
            spent,
            tuning_store(),
            again=again,
            storage=storage,
            seed=seed,
            resume=resume,
            seconds=seconds,
            progress=advance,
        )
        for found in searches:
            done.append(found)
            advance(found.tunable, None)
    if as_json:
        print_json([_data(one) for one in done])
        return
    _print(done, len(problems))


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


def _bars(total: int) -> Any:
    """A context with a bar over problems; what it gives is called with a problem and where its
    search is, None at its end.
    """
    from contextlib import contextmanager

    @contextmanager
    def shown() -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        with Bars(*columns, console=err(), transient=True) as bars:
            task = bars.add_task("compiling", total=total)

            def advance(tunable: KernelTunable, step: Progress | None) -> None:
                if step is None:
                    bars.advance(task)
                    return
                best = "" if step.best is None else f", best {step.best:.3f} of the default"
                text = f"{tunable.name}: {step.phase} {step.done}/{step.total}{best}"
                bars.update(task, description=text)

            yield advance

    return shown()


def _data(one: TunedProblem) -> dict[str, Any]:
    tuned = one.tuned
    return {
        "problem": one.tunable.name,
        "known": tuned is None,
        "gain": one.gain,
        "record": None if one.record is None else one.record.to_json(),
        "choice": None if tuned is None else tuned.choice.to_json(),
        "notes": [] if tuned is None else list(tuned.notes),
        "outcomes": [] if tuned is None else [o.to_json() for o in tuned.outcomes],
    }


def _print(done: list[TunedProblem], total: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("problem", "default", "chosen", "gain", "tried", "config"):
        table.add_column(title, justify="left" if title in ("problem", "config") else "right")
    for one in done:
        record = one.record
        if record is None:
            table.add_row(one.tunable.name, "", "", "", "", "the default: nothing was measured")
            continue
        changed = {n: v for n, v in record.config.values if record.default.get(n) != v}
        table.add_row(
            one.tunable.name,
            f"{record.default_seconds * 1e6:.2f} µs",
            f"{record.seconds * 1e6:.2f} µs",
            f"{one.gain:.3f}×",
            "known" if one.tuned is None else str(len(one.tuned.outcomes)),
            " ".join(f"{n}={v}" for n, v in changed.items()) or "the default",
        )
    out().print(table)
    for line in dict.fromkeys(n for one in done if one.tuned for n in one.tuned.notes):
        note(line)
    if len(done) < total:
        note(f"{total - len(done)} of {total} problems were not reached")

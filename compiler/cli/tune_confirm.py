"""``tilewright tune --confirm``: whole decode steps of the old and the new choices, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from .bench_options import parse_batches
from .console import note, out, progress

if TYPE_CHECKING:
    from ...codegen.triton.tuning.tunable import KernelTunable
    from ...runtime.image import EngineImage
    from ..confirm import BatchVerdict, Confirmed

ConfirmOption = Annotated[
    bool,
    typer.Option(
        "--confirm",
        help="Then time whole decode steps of the old and the new choices in turns; products of "
        "steps that got slower go back to the default, and the exit code is 1.",
    ),
]
AgainstOption = Annotated[
    str,
    typer.Option(
        help="Old choices of --confirm: defaults (untuned), or before (what was known before)."
    ),
]
BatchesOption = Annotated[
    str | None,
    typer.Option(
        "--batch",
        help="Sequences of the steps of --confirm, as 1,8,32; by default these and the most.",
        show_default=False,
    ),
]


class Confirmation:
    """What is to be compared, made before anything is tuned.

    Args:
        image: the engine.
        against: "defaults" or "before".
        batch: as the option has it.

    Raises:
        UsageError: another word, or batches that the engine does not take.
    """

    def __init__(self, image: EngineImage, against: str, batch: str | None) -> None:
        from ..confirm import batches_of, recut
        from ..tuning import tuning_store

        if against not in ("defaults", "before"):
            raise UsageError(
                f"option --against {against}",
                expected="defaults or before",
                found=repr(against),
                remedy="Leave it out to compare with the untuned defaults.",
            )
        self.image = image
        self.batches = batches_of(image, parse_batches(batch) if batch is not None else ())
        self.old = recut(image, tuning_store() if against == "before" else None)

    def run(self, problems: Sequence[KernelTunable]) -> Confirmed:
        """Compares with what the store knows now."""
        from ..confirm import confirm, recut
        from ..tuning import tuning_store

        store = tuning_store()
        new = recut(self.image, store)
        with progress("confirm") as advance:
            advance("loading", 0.0)
            return confirm(
                self.old,
                new,
                problems,
                store,
                self.batches,
                progress=lambda done, most: advance(f"round {done} of {most}", done / most),
            )


def print_confirmed(found: Confirmed) -> None:
    """A row for each batch, and what was put back."""
    from .tables import plain_table

    if not found.verdicts:
        out().print("confirm: old and new choices are the same kernels")
        return
    table = plain_table(("decode step", "old", "new", "new over old", "rounds", "verdict"))
    table.columns[-1].justify = "left"
    for verdict in found.verdicts:
        table.add_row(*_cells(verdict))
    out().print(table)
    for line in dict.fromkeys(one.note for one in found.verdicts if one.note):
        note(line)
    for record in found.put_back:
        note(f"put back to the default: {record.key}")


def _cells(verdict: BatchVerdict) -> tuple[str, ...]:
    times = ["" if x is None else f"{x * 1e3:.3f} ms" for x in (verdict.old, verdict.new)]
    ratio = verdict.ratio
    told = "" if ratio is None else f"×{ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"
    return f"batch {verdict.batch}", *times, told, str(verdict.rounds), verdict.words

"""``tilewright verify``: whether an engine is whole, and computes what its graph says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import VerificationError
from .console import out, print_json, progress
from .options import CheckpointOption, JsonOption

if TYPE_CHECKING:
    from ..engine_checks import Check


def verify_engine(
    engine: Annotated[str, typer.Argument(help="An engine folder.", show_default=False)],
    checkpoint: CheckpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every hash of ENGINE, its graphs, and its numbers against the reference."""
    from ...runtime.base_engine import check_device
    from ...runtime.folder import load_image

    console = out()
    checks: list[Check] = []
    failure: VerificationError | None = None
    with progress("verify") as advance:
        advance("hashes", 0.0)
        image = load_image(engine, checkpoint)
        check_device(image)
        from ..engine_checks import Check, verify_image

        checks.append(Check("files", "every file has the hash of the manifest"))
        try:
            checks.extend(verify_image(image, advance))
        except VerificationError as error:
            failure = error
    if as_json:
        print_json({"ok": failure is None, "checks": [[c.name, c.found] for c in checks]})
    else:
        for check in checks:
            console.print(f"[green]ok[/]  {check.name}: {check.found}")
    if failure is not None:
        raise failure

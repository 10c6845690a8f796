"""Those that run in turns: ours and its rivals, of which one that fails is out and says why."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...errors import TilewrightError
from .contenders import PACKAGES, Run, absent, make_contender
from .reference import ReferenceModel


@dataclass(frozen=True, slots=True)
class Series:
    """One contender's runs, all of the same prompt and length.

    Attributes:
        name: "tilewright", or that of a contender.
        prefill: prompt tokens a second, one figure a run.
        decode: new tokens a second after the first, one figure a run.
        ttft: median seconds to the first token.
        itl: median seconds between tokens, over all runs.
        token_ids: of the last run.
    """

    name: str
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    ttft: float
    itl: float
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Entrant:
    """One of those that run in turns.

    Attributes:
        name, label: for options and for reading.
        run: generates from a prompt.
        first_steps: seconds of the steps that compile.
        error: why it runs no more.
        is_absent: whether that is because it is not installed.
        runs: what was measured, the first one included, which does not count.
    """

    name: str
    label: str
    run: Callable[[list[int], int], Run] | None
    first_steps: tuple[float, ...] = ()
    error: str | None = None
    is_absent: bool = False
    runs: list[Run] = field(default_factory=list)

    def go(self, prompt: list[int], new_tokens: int) -> None:
        """One run. Ours may raise; a rival that does is out, and says why."""
        if self.run is None:
            return
        try:
            self.runs.append(self.run(prompt, new_tokens))
        except Exception as error:
            if self.name == "tilewright":
                raise
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Takes it out."""
        if isinstance(error, TilewrightError):
            raise error
        text = " ".join(str(error).split())[:300]
        self.error, self.run, self.runs = f"{type(error).__name__}: {text}", None, []

    def series(self, prompt_tokens: int) -> Series | None:
        """Its runs but the first; None if it failed."""
        runs = self.runs[1:]
        if not runs:
            return None
        return Series(
            self.name,
            tuple(prompt_tokens / run.ttft for run in runs),
            tuple(len(run.itl) / sum(run.itl) for run in runs),
            statistics.median(run.ttft for run in runs),
            statistics.median(seconds for run in runs for seconds in run.itl),
            tuple(runs[-1].token_ids),
        )


def enter(name: str, model: ReferenceModel, prompt: list[int], new_tokens: int) -> Entrant:
    """A contender, prepared; one that cannot be is out from the start."""
    if absent(name):
        return left_out(name)
    entrant = Entrant(name, name, None)
    try:
        contender = make_contender(name, model, len(prompt) + new_tokens)
        entrant.label = f"{contender.label}, {str(model.dtype).removeprefix('torch.')}"
        contender.prepare([prompt])
    except Exception as error:  # whatever a compiler may raise
        entrant.fail(error)
        return entrant
    entrant.run, entrant.first_steps = contender.run, contender.first_steps
    return entrant


def left_out(name: str) -> Entrant:
    """One that is not installed."""
    said = f"not installed (pip install {PACKAGES[name]})"
    return Entrant(name, name, None, error=said, is_absent=True)


def enter_all(
    reference: Callable[[], ReferenceModel] | None,
    compare: Sequence[str],
    prompt: list[int],
    new_tokens: int,
) -> tuple[ReferenceModel | None, list[Entrant]]:
    """The model and who runs it; if it cannot be had, all of them are out."""
    if reference is None:
        return None, []
    try:
        model = reference()
    except TilewrightError:
        raise
    except Exception as error:  # not enough memory, or whatever the model's own code raises
        rivals = [left_out(n) if absent(n) else Entrant(n, n, None) for n in compare]
        for rival in rivals:
            if not rival.is_absent:
                rival.fail(error)
        return None, rivals
    return model, [enter(name, model, prompt, new_tokens) for name in compare]

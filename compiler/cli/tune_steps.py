"""``tilewright tune MODEL``: which way decode steps go, behind the configs of their kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from ...autotune.effort import Effort, TuneConfig
    from ...runtime.image import EngineImage
    from ..decode_choice import StepProblem
    from ..decode_tunable import DecodeTunable
    from ..tuning import TunedProblem


def problems_of_steps(image: EngineImage, named: bool) -> Sequence[StepProblem]:
    """The decode steps of an engine whose way can be chosen; nothing is written for that.

    Raises:
        UnsupportedError: there are none, and they were ``named`` by the user.
    """
    from ..decode_tunable import image_problems

    try:
        return image_problems(image)
    except UnsupportedError:
        if named:
            raise
        return ()


@contextmanager
def steps_of_image(image: EngineImage, named: bool) -> Iterator[Sequence[DecodeTunable]]:
    """The decode steps of an engine whose way can be chosen, until the block ends.

    Raises:
        UnsupportedError: there are none, and they were ``named`` by the user.
    """
    from .. import decode_tunable
    from ..tuning import tuning_store

    with ExitStack() as stack:
        steps: Sequence[DecodeTunable] = ()
        try:
            steps = stack.enter_context(decode_tunable.tunable_image(image, tuning_store()))
        except UnsupportedError:
            if named:
                raise
        yield steps


def tune_steps_of(
    image: EngineImage,
    effort: Effort,
    budget: TuneConfig,
    ends: float | None,
    kernels: Sequence[TunedProblem],
    stopped: bool,
    *,
    named: bool,
    resume: bool,
    again: bool,
) -> tuple[list[TunedProblem], bool]:
    """What became of an engine's kernels and, behind them, of its decode steps, and whether Ctrl-C
    ended it.

    Args:
        image: the engine.
        effort: as of kernels.
        budget: whose storage and seed are taken.
        ends: by `time.monotonic`, None for no end.
        kernels: what became of its kernels: where one was measured now, steps are, too.
        stopped: whether their turn does not come any more.
        named: whether the user named them, so that it is an error if there are none.
        resume, again: as `tune_steps` takes them.
    """
    from ..decode_tunable import tune_steps
    from ..tuning import TunedProblem, tuning_store
    from .tune_view import bars

    again = again or any(one.was_measured for one in kernels)
    done: list[TunedProblem] = []
    with steps_of_image(image, named) as steps, bars(len(steps), budget.seconds) as advance:
        searches = tune_steps(
            () if stopped else steps,
            effort,
            tuning_store(),
            again=again,
            storage=budget.storage,
            seed=budget.seed,
            resume=resume,
            deadline=ends,
            progress=advance,
        )
        try:
            for found in searches:
                done.append(found)
                advance(found.tunable, None)
                stopped |= found.tuned is not None and found.tuned.interrupted
        except KeyboardInterrupt:  # between two searches, or in the compilation before one
            stopped = True
        rest = [TunedProblem(one, None, None) for one in steps[len(done) :]]
    return [*kernels, *done, *rest], stopped

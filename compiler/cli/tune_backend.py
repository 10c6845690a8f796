"""``tilewright tune MODEL``: the choice of the backend, beside the configs of kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...errors import UsageError
from .console import progress
from .options import is_engine, resolve_model
from .tune_view import share_of, told

if TYPE_CHECKING:
    from ...autotune.effort import Effort, TuneConfig
    from ...runtime.image import EngineImage
    from ..backend_tunable import Rivals
    from ..options import CompileOptions
    from ..tuning import TunedProblem

BACKEND, STEPS = "backend", "decode_step"
"""Their names in ``--only``."""


def rivals_of(
    model: str,
    *,
    target: str,
    backend: str,
    dtype: str,
    quantize: str | None,
    max_model_len: int | None,
    max_batch_size: int | None,
    random_weights: int | None,
) -> Rivals | None:
    """What backends there are for a model; None where there is no choice: an engine has one, or
    the user names one.
    """
    if is_engine(model) or backend != "auto":
        return None
    from ..api import Phases, backend_rivals

    chosen, options = resolve_model(
        model,
        target=target,
        backend=backend,
        kv_cache="auto",
        dtype=dtype,
        quantize=quantize,
        max_model_len=max_model_len,
        max_batch_size=max_batch_size,
        verify="structure",
        trust_remote_code=False,
        random_weights=random_weights,
    )
    with progress("look at the model") as advance:
        return backend_rivals(chosen.path, options, Phases(advance))


class Parts(NamedTuple):
    """What ``--only`` names.

    Attributes:
        kernels: their templates, "" for none, None for all.
        steps: whether the way of decode steps.
        backend: whether the backend.
        named: whether there is an ``--only``: what it names must be there.
    """

    kernels: str | None
    steps: bool
    backend: bool
    named: bool

    @property
    def on_gpu(self) -> bool:
        """Whether any of it needs an engine with kernels of ours."""
        return self.kernels != "" or self.steps


def parted(only: str | None) -> Parts:
    """What ``--only`` names; all without it."""
    if only is None:
        return Parts(None, True, True, named=False)
    names = [name.strip() for name in only.split(",")]
    kernels = ",".join(name for name in names if name not in (BACKEND, STEPS))
    return Parts(kernels, STEPS in names, BACKEND in names, named=True)


def no_choice(engine: str, backend: str) -> UsageError:
    """The error of a backend that is to be chosen, and is given."""
    found = f"the engine {engine}, which has one" if is_engine(engine) else f"--backend {backend}"
    return UsageError(
        f"option --only {BACKEND}",
        expected="a causal LM that is compiled with --backend auto",
        found=found if is_engine(engine) or backend != "auto" else f"{engine}, which is none",
        remedy="Name the model, without --backend.",
    )


def tune_rivals(
    rivals: Rivals,
    effort: Effort,
    budget: TuneConfig,
    ends: float | None,
    *,
    resume: bool,
    again: bool,
    stopped: bool,
) -> tuple[TunedProblem, bool]:
    """What became of the choice, and whether Ctrl-C ended it.

    Args:
        rivals: what there is to choose from.
        effort: as of kernels.
        budget: whose storage and seed are taken.
        ends: by `time.monotonic`, None for no end.
        resume, again: as `tune_backend` takes them.
        stopped: whether its turn does not come any more.
    """
    from ..backend_choice import tunable_of, tune_backend
    from ..backend_tunable import BackendTunable
    from ..tuning import TunedProblem, tuning_store

    unreached = TunedProblem(BackendTunable(rivals, Path()), None, None)
    if stopped or (ends is not None and effort.measures and time.monotonic() >= ends):
        return unreached, False
    try:
        with progress("backends") as advance, tunable_of(_shown(rivals, advance)) as tunable:
            one = tune_backend(
                tunable,
                effort,
                tuning_store(),
                again=again,
                storage=budget.storage,
                seed=budget.seed,
                resume=resume,
                deadline=ends,
                progress=lambda step: advance(told(step), share_of(step)),
            )
    except KeyboardInterrupt:  # while candidates were compiled
        return unreached, True
    return one, one.tuned is not None and one.tuned.interrupted


def _shown(rivals: Rivals, advance: Callable[[str, float], None]) -> Rivals:
    """The same, which shows what it compiles."""

    def make(options: CompileOptions) -> EngineImage:
        advance(f"compiling for {options.backend}", 0.0)
        return rivals.make(options)

    return replace(rivals, make=make)

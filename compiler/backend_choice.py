"""Which backend computes a model: what was measured on this device, else a default of its kind.

One backend serves all graphs of an engine, the general one and that of decode steps: they share a
KV cache, whose form (pages or slots) is the backend's. So candidates are whole engines. The way of
the data:

    options     `resolve_options` takes the device's default for ``backend="auto"``, and keeps the
                same options for each other backend of the registry (codegen/base.py) as a rival,
                or why it can be none: another target, a cache that it has not, not installed
    key         `key_of`: the captured graph's structure, which is the same for all of them, and
                all else that the choice depends on; the libraries' versions are conditions
    lookup      ``tune="cached"``: a record of this very key says which to take; one of other
                versions is taken too, with a note. Nothing of the like: the default
    measuring   ``tune="quick"``, ``"full"`` or a TuneConfig: what is not known is measured as
                configs of kernels are. `BackendTunable.prepare` compiles each candidate into a
                folder (a Triton one with its own kernels tuned first); a worker process, which may
                hang or die of one, loads them, holds their logits against float32 eager ones
                (`BackendRunner.check`), and times requests (`Work`); autotune/decide.py decides:
                the default stays unless one is surely faster
    record      in the same store as those of kernels, merged and explained like them
    report      ``engine.report()["backend"]``: which one, by which rule, and what else was tried

A named backend, ``tune="none"`` and ``deterministic=True`` know no rivals. Plain modules keep the
default of their device: what they are called with is not known before.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ..autotune.effort import Effort, TuneConfig, effort_of
from ..autotune.key import Conditions
from ..autotune.lookup import Found, lookup
from ..autotune.outcome import Outcome
from ..autotune.pool import Pool
from ..autotune.record import Record
from ..autotune.search import Progress, tune
from ..autotune.store import Store, unwritable
from ..autotune.worker import Limits, WorkerError
from ..codegen.base import library_versions
from ..codegen.program import Json
from ..codegen.triton.tuning.conditions import driver_version
from ..errors import TilewrightError
from ..runtime.image import EngineImage
from ..settings import current
from ..version import __version__
from .backend_tunable import TEMPLATE, BackendTunable, Make, Rivals, backend_of
from .options import CompileOptions
from .tuning import TunedProblem, is_known, record_of, tuning_store, unmeasured

LIMITS = Limits(start=900.0, load=900.0, check=600.0, time=600.0)
"""Of a worker: weights are read and laid out, and a request may take minutes on a CPU."""

_LONGER = 5  # times a kernel's seconds: a round takes seconds here, not microseconds
_ROUNDS = 4  # of a candidate that is not stopped


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """Which backend to take.

    Attributes:
        facts: for the report: ``name``, ``how`` (named, default, measured, shipped, stale), ``why``
            in words, ``gain`` over the default and ``tried`` (seconds of a request, or what was
            wrong, by backend).
        image: the engine, where it is another than the default's, or was compiled to be measured.
    """

    facts: dict[str, Json]
    image: EngineImage | None = None


def choose_backend(rivals: Rivals | None, options: CompileOptions) -> BackendChoice:
    """The backend of a causal LM.

    Args:
        rivals: what there is to choose from; None where there is nothing.
        options: of the compile.

    Raises:
        KeyboardInterrupt: Ctrl-C, once what was found until then is in the store.
    """
    name = options.backend
    if rivals is None:
        forced = "deterministic=True has no other" if options.deterministic else "it was asked for"
        return BackendChoice(_facts(name, "named", forced))
    if options.tune == "none":
        return BackendChoice(_facts(name, "default", "tune='none' looks nothing up"))
    store = tuning_store(options.target.name)
    if effort_of(options.tune).measures:
        return _measured(rivals, options.tune, store)
    found = lookup(store, rivals.key, conditions_here())
    return _as_recorded(rivals, found)


def conditions_here() -> Conditions:
    """The versions of all backends' libraries, and of the driver where there is one."""
    return Conditions("", driver_version(), __version__, library_versions())


def effort_for_backends(effort: Effort) -> Effort:
    """What is spent on the choice of a backend: all of them are tried, a few long rounds each."""
    rounds, seconds = min(effort.rounds, _ROUNDS), effort.seconds * _LONGER
    return replace(effort, share=1.0, rounds=rounds, seconds=seconds)


@contextmanager
def tunable_of(rivals: Rivals) -> Iterator[BackendTunable]:
    """The choice as the tuner takes it, with a folder within TILEWRIGHT_CACHE that is gone when the
    block ends.

    Raises:
        UsageError: the folder cannot be made.
    """
    parent = current().cache
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="rivals-", dir=parent)
    except OSError as error:
        raise unwritable(parent, error) from error
    with folder as name:
        yield BackendTunable(rivals, Path(name))


def tune_backend(
    tunable: BackendTunable,
    effort: Effort,
    store: Store,
    *,
    again: bool = False,
    storage: str | Path | None = None,
    seed: int = 0,
    resume: bool = False,
    deadline: float | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    pool: Pool | None = None,
) -> TunedProblem:
    """Measures which backend is the fastest, unless the store knows, and records it.

    Ctrl-C and the deadline decide on what is known until then; the record says so, for the next run
    to measure it again. While candidates are compiled Ctrl-C just ends it: nothing is known yet.

    Args:
        tunable: the choice.
        effort: of kernels; `effort_for_backends` says what it means here.
        store: where the record goes.
        again: measure also what the store knows.
        storage, seed, resume: of the search, as `tuning.tune_all` takes them.
        deadline: by `time.monotonic`.
        progress: called as the search goes on.
        pool: of workers; one of its own by default.

    Raises:
        StorageError: ``storage`` does not answer.
        UsageError: the store cannot be written; nothing is measured then.
    """
    conditions = conditions_here()
    found = lookup(store, tunable.key, conditions)
    if is_known(found) and not again:
        return TunedProblem(tunable, found.record, None)
    if effort.measures:
        store.check_writable()
        tunable.prepare(tunable.pinned)  # before the search's clock begins to run
    spent = effort_for_backends(effort)
    with nullcontext(pool) if pool is not None else Pool(LIMITS) as workers:
        try:
            tuned = tune(
                tunable,
                spent,
                workers,
                seed=seed,
                storage=storage,
                resume=resume,
                tag=hashlib.sha256(conditions.libraries.encode()).hexdigest()[:8],
                deadline=deadline,
                progress=progress,
            )
        except WorkerError as error:  # such as a reference that does not fit the device
            return unmeasured(tunable, str(error))
    over = tuned.interrupted or (deadline is not None and time.monotonic() >= deadline)
    record = record_of(tunable, conditions, tuned, effort, seed, cut_short=over)
    if record is not None:
        store.add(record)
    return TunedProblem(tunable, record, tuned)


def _measured(rivals: Rivals, wanted: str | TuneConfig, store: Store) -> BackendChoice:
    """What measuring comes to, with the engine that was compiled for it."""
    given = wanted if isinstance(wanted, TuneConfig) else TuneConfig()
    ends = None if given.seconds is None else time.monotonic() + given.seconds
    rivals = replace(rivals, make=_within(rivals.make, ends))
    with tunable_of(rivals) as tunable:
        one = tune_backend(
            tunable,
            effort_of(wanted),
            store,
            storage=given.storage,
            seed=given.seed,
            deadline=ends,
        )
        if one.tuned is None:  # known before
            return _as_recorded(rivals, lookup(store, rivals.key, conditions_here()))
        if one.tuned.interrupted:
            raise KeyboardInterrupt
        choice = one.tuned.choice
        name = backend_of(choice.config)
        tried = {backend_of(o.config): _became(o) for o in one.tuned.outcomes}
        how = "default" if choice.seconds is None else "measured"
        facts = _facts(name, how, choice.reason, one.gain, tried)
        return BackendChoice(facts, tunable.images.get(name))


def _within(make: Make, ends: float | None) -> Make:
    """Compiles, with what is left until ``ends`` for the kernels of a candidate."""

    def made(options: CompileOptions) -> EngineImage:
        if ends is not None and isinstance(options.tune, TuneConfig):
            left = max(0.0, ends - time.monotonic())
            options = replace(options, tune=replace(options.tune, seconds=left))
        return make(options)

    return made


def _as_recorded(rivals: Rivals, found: Found) -> BackendChoice:
    """What a record says, where there is one; the default where what it says does not compile."""
    default, record = backend_of(rivals.default), found.record
    if record is None or found.how not in ("exact", "shipped", "stale"):
        return BackendChoice(_facts(default, "default", _missed(found)))
    name = backend_of(record.config)
    why = f"measured {record.made}"
    if found.how == "stale":
        why += f", under another {', '.join(found.differs)}: tune again to measure it here"
    how = "measured" if found.how == "exact" else found.how
    facts = _facts(name, how, why, record.default_seconds / record.seconds, _recorded(record))
    if name == default:
        return BackendChoice(facts)
    if name not in rivals.options:
        why = f"{name}, which was measured to be faster, cannot be taken: "
        why += rivals.refused.get(name, "there is no such backend")
        return BackendChoice(_facts(default, "default", why))
    try:
        return BackendChoice(facts, rivals.make(rivals.options[name]))
    except (TilewrightError, ImportError) as error:
        why = f"{name}, which was measured to be faster, does not compile any more: {error}"
        return BackendChoice(_facts(default, "default", why))


def _missed(found: Found) -> str:
    """Why no record serves, with the fields in which the nearest of its kind differs."""
    nearest = found.nearest
    if nearest is None or nearest.key.template != TEMPLATE:
        return "nothing was measured"
    return f"what was measured differs in {', '.join(found.differs)}"


def _became(outcome: Outcome) -> Json:
    """Seconds of a request, or why there are none."""
    if outcome.ok and outcome.median is not None:
        return outcome.median
    return f"{outcome.status}: {outcome.reason}"


def _recorded(record: Record) -> dict[str, Json]:
    tried: dict[str, Json] = {backend_of(c): reason for c, reason in record.failed}
    tried |= {backend_of(c): seconds for c, seconds in record.runners_up}
    tried[backend_of(record.default)] = record.default_seconds
    tried[backend_of(record.config)] = record.seconds
    return tried


def _facts(
    name: str,
    how: str,
    why: str,
    gain: float | None = None,
    tried: dict[str, Json] | None = None,
) -> dict[str, Json]:
    return {"name": name, "how": how, "why": why, "gain": gain, "tried": tried or {}}

"""Tunes the kernels of a model on the device at hand, and keeps what was found in the store."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from ..autotune.config import Config
from ..autotune.decide import untried
from ..autotune.effort import Effort, TuneConfig, effort_of
from ..autotune.key import Conditions, Key
from ..autotune.lookup import Found, lookup, neighbours
from ..autotune.pool import Pool
from ..autotune.record import Record
from ..autotune.search import Progress, Tuned, quick_candidates, tune
from ..autotune.store import Store
from ..autotune.tunable import Tunable
from ..codegen.triton.tuning.conditions import conditions_here
from ..codegen.triton.tuning.problems import problems_of
from ..codegen.triton.tuning.tunable import KernelTunable
from ..codegen.triton.workers import kept_workers
from ..errors import TilewrightError, UnsupportedError
from ..ir.graph import Graph
from ..ir.parser import parse_graph
from ..runtime.image import EngineImage
from ..settings import current
from ..targets import Target
from ..targets.detect import available_cores

if TYPE_CHECKING:
    from .options import CompileOptions

CUT_SHORT = ", cut short"
"""How the budget of a record ends whose search Ctrl-C or the clock has ended."""

_MOST_AHEAD = 3  # problems whose candidates are compiled at once
_CORES_A_PROBLEM = 5  # that compiling 24 candidates keeps busy (aot.py)

TABLES = Path(__file__).parent.parent / "autotune" / "tables"


@dataclass(frozen=True)
class TunedProblem:
    """What became of one problem.

    Attributes:
        tunable: the problem.
        record: what the store has for it now; None where nothing was measured.
        tuned: the search; None where the store knew it before, or where it was not reached.
    """

    tunable: Tunable
    record: Record | None
    tuned: Tuned | None

    @property
    def reached(self) -> bool:
        """Whether its turn came before the time was over."""
        return self.record is not None or self.tuned is not None

    @property
    def was_measured(self) -> bool:
        """Whether it was measured now: what depends on the choice is to be measured again."""
        return self.tuned is not None and self.record is not None

    @property
    def gain(self) -> float | None:
        """The default's time over the choice's, both timed in turns; 1 for the default."""
        if self.record is None:
            return None
        return self.record.default_seconds / self.record.seconds


def tuning_store(device: str = "*") -> Store:
    """The user's own records, and the tables that come with the package: all, or a device's."""
    return Store(current().cache / "tuning.jsonl", sorted(TABLES.glob(f"{device}.jsonl")))


def problems_of_image(image: EngineImage) -> Sequence[KernelTunable]:
    """What can be tuned of an engine: the problems of its decode graph, then of the general one; of
    a module those of its only graph.

    Raises:
        UnsupportedError: an engine without kernels of ours.
    """
    decode = image.decode
    if image.backend == "triton" and image.lm is None and image.graphs:
        return problems_of(parse_graph(image.graphs[-1][1]), Target.parse(image.target), None)
    if image.backend != "triton" or image.lm is None or decode is None or not decode.graphs:
        raise UnsupportedError(
            f"tuning {image.name}",
            expected="a module, or a causal LM with a decode Program, of the Triton backend",
            found=f"backend {image.backend!r}" + ("" if decode else ", no decode Program"),
            remedy="Compile it with backend='triton', for a GPU, and without deterministic=True.",
        )
    steps = parse_graph(decode.graphs[-1][1])
    general = parse_graph(image.graphs[-1][1]) if image.graphs else None
    target, lm = Target.parse(image.target), image.lm
    return problems_of_graphs(steps, general, target, lm.max_batch_size, lm.max_model_len)


def problems_of_graphs(
    decode: Graph | None,
    general: Graph | None,
    target: Target,
    max_sequences: int,
    max_model_len: int | None,
) -> Sequence[KernelTunable]:
    """The problems of a decode graph and, behind them, of the general one, where there are such:
    most of the time of serving is spent in the former.
    """
    found: dict[str, KernelTunable] = {}
    for graph, most in ((decode, max_sequences), (general, None)):
        if graph is not None:
            for tunable in problems_of(graph, target, most, max_model_len):
                found.setdefault(tunable.key.digest, tunable)
    return list(found.values())


def tune_graphs(
    decode: Graph | None, general: Graph, options: CompileOptions, max_model_len: int | None
) -> None:
    """Tunes what the store does not know of a model's graphs, as ``options.tune`` says: kernels
    and, where the user leaves it open, whether decode steps are one launch.

    Raises:
        KeyboardInterrupt: Ctrl-C, once what was found until then is in the store.
    """
    wanted, store = options.tune, tuning_store()
    given = wanted if isinstance(wanted, TuneConfig) else TuneConfig()
    ends = None if given.seconds is None else time.monotonic() + given.seconds
    problems = problems_of_graphs(
        decode, general, options.target, options.max_batch_size, max_model_len
    )
    how: dict[str, Any] = {"storage": given.storage, "seed": given.seed}
    changed = _measured(tune_all(problems, effort_of(wanted), store, seconds=given.seconds, **how))
    if decode is None or max_model_len is None or options.decode != "auto":
        return
    from .decode_tunable import tunable_steps, tune_steps

    most = options.max_batch_size
    with ExitStack() as stack:
        try:
            steps = stack.enter_context(
                tunable_steps(decode, options.target, most, max_model_len, store)
            )
        except UnsupportedError:  # the one launch does not know the model, or the device
            return
        how |= {"again": changed, "deadline": ends}
        _measured(tune_steps(steps, effort_of(wanted), store, **how))


def _measured(searches: Iterable[TunedProblem]) -> bool:
    """Whether any of them measured something; KeyboardInterrupt where Ctrl-C ended one."""
    found = False
    for one in searches:
        if one.tuned is not None and one.tuned.interrupted:
            raise KeyboardInterrupt
        found |= one.was_measured
    return found


class Keyed(Protocol):
    """What a record is looked up for."""

    @property
    def key(self) -> Key:
        """What the choice depends on."""
        ...


def looked_up(problems: Sequence[Keyed], store: Store) -> Sequence[Found]:
    """What the store has for each problem, under the conditions of this process."""
    conditions = conditions_here(driver=True)
    return [lookup(store, tunable.key, conditions) for tunable in problems]


def tune_all(
    problems: Sequence[Tunable],
    effort: Effort,
    store: Store,
    *,
    again: bool = False,
    storage: str | Path | None = None,
    seed: int = 0,
    resume: bool = False,
    seconds: float | None = None,
    progress: Callable[[Tunable, Progress], None] = lambda tunable, progress: None,
    pool: Pool | None = None,
) -> Iterator[TunedProblem]:
    """Tunes problem after problem, and records each as soon as it is decided.

    Ctrl-C and the end of ``seconds`` cut short the problem at hand: it is decided on what is known
    until then, and the record says so, for the next run to take it up again. Those behind it are
    given as not reached, unless the store knows them.

    Candidates follow from what the store has at the start, not from what is found on the way: so
    those of the next problems are compiled while the device is busy with this one's.

    Args:
        problems: what to tune.
        effort: spent on each at most.
        store: where records go, and where searches start from.
        again: measure also what the store knows under these conditions.
        storage: of Optuna, for searches that several processes share or that go on later.
        seed: of the sampler.
        resume: take up claims that ended processes left in ``storage``.
        seconds: for all of them together.
        progress: called as a search goes on.
        pool: of workers; one of its own by default.

    Raises:
        StorageError: ``storage`` does not answer.
        UsageError: the store cannot be written; nothing is measured for it then.
    """
    conditions = conditions_here(driver=True)
    within = math.inf if seconds is None or not effort.measures else seconds
    ends = time.monotonic() + within
    own = pool or Pool()
    with ExitStack() as stack:
        if pool is None:
            stack.callback(own.close)
        stack.enter_context(kept_workers())
        new = [p for p in problems if again or not is_known(lookup(store, p.key, conditions))]
        ahead = stack.enter_context(_Ahead(effort, store, new))
        over = False
        for tunable in problems:
            found = lookup(store, tunable.key, conditions)
            if not again and is_known(found):
                yield TunedProblem(tunable, found.record, None)
                continue
            over = over or time.monotonic() >= ends
            if over:
                yield TunedProblem(tunable, None, None)
                continue
            if effort.measures:
                store.check_writable()
            ahead.wait_for(tunable)
            tuned = tune(
                tunable,
                effort,
                own,
                store_neighbours=ahead.near.get(tunable.key.digest, ()),
                seed=seed,
                storage=storage,
                resume=resume,
                tag=conditions.triton,
                deadline=ends,
                progress=partial(progress, tunable),
            )
            over = tuned.interrupted or time.monotonic() >= ends
            record = record_of(tunable, conditions, tuned, effort, seed, cut_short=over)
            if record is not None:
                store.add(record)
            yield TunedProblem(tunable, record, tuned)


def is_known(found: Found) -> bool:
    """Whether a problem was measured, under these conditions and to the end."""
    record = found.record
    measured = record is not None and found.how in ("exact", "shipped")
    return measured and not (record is not None and record.budget.endswith(CUT_SHORT))


class _Ahead:
    """Compiles candidates on the CPU while the device times those of the problem before.

    Args:
        effort: that says how many candidates there are.
        store: where searches start from.
        problems: that will be searched, in order.

    Attributes:
        near: the neighbours' winners of each problem, by the digest of its key.
    """

    def __init__(self, effort: Effort, store: Store, problems: Sequence[Tunable]) -> None:
        self.effort, self.rest = effort, list(problems) if effort.measures else []
        self.near = {one.key.digest: neighbours(store, one.key) for one in problems}
        self.threads = max(1, min(_MOST_AHEAD, available_cores() // _CORES_A_PROBLEM))
        self.executor = ThreadPoolExecutor(self.threads, "ahead")
        self.begun: dict[str, Future[None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.executor.shutdown(cancel_futures=True)

    def wait_for(self, tunable: Tunable) -> None:
        """Until a problem's candidates are compiled, with those of the next ones under way."""
        digests = [one.key.digest for one in self.rest]
        if tunable.key.digest in digests:
            del self.rest[: digests.index(tunable.key.digest)]
        for one in self.rest[: self.threads + 1]:
            if one.key.digest not in self.begun:
                near = self.near[one.key.digest]
                begun = self.executor.submit(_compile, one, self.effort, near)
                self.begun[one.key.digest] = begun
        if tunable.key.digest in self.begun:
            self.begun[tunable.key.digest].result()


def _compile(tunable: Tunable, effort: Effort, near: Sequence[Config]) -> None:
    """Brings the candidates that the key gives into the cache of kernels."""
    limit = effort.allowed(tunable.space)
    with suppress(TilewrightError):  # who asks for them next is told
        tunable.prepare(quick_candidates(tunable, near, limit=limit))


def unmeasured(tunable: Tunable, why: str) -> TunedProblem:
    """The default, where no worker starts."""
    coverage = tunable.space.coverage(())
    return TunedProblem(tunable, None, Tuned(untried(tunable, why), (), "", coverage, (why,)))


def _other_way(tunable: Tunable, tuned: Tuned) -> tuple[tuple[Config, float], ...]:
    """Of a choice between two, the other one's time, also where it was stopped early; a kernel's
    runners-up are such that came near, since others are taken from among them.
    """
    if tunable.space.count() != 2:
        return ()
    choice = tuned.choice
    base = choice.default_seconds or choice.seconds or math.nan
    others = [(o.ratio, o.config) for o in tuned.outcomes if o.ok and o.config != choice.config]
    timed = [(ratio * base, config) for ratio, config in others if ratio is not None]
    return tuple((config, seconds) for seconds, config in sorted(timed, key=itemgetter(0))[:1])


def record_of(
    tunable: Tunable,
    conditions: Conditions,
    tuned: Tuned,
    effort: Effort,
    seed: int,
    *,
    cut_short: bool = False,
) -> Record | None:
    """The record of a search; None where neither the choice nor the default was timed."""
    choice = tuned.choice
    if choice.seconds is None:
        return None
    failed = tuple((o.config, f"{o.status}: {o.reason}") for o in tuned.outcomes if not o.ok)
    return Record(
        key=tunable.key,
        conditions=conditions,
        config=choice.config,
        seconds=choice.seconds,
        default=choice.default,
        default_seconds=choice.default_seconds or choice.seconds,
        numerics=choice.numerics,
        runners_up=choice.runners_up or _other_way(tunable, tuned),
        failed=failed,
        trials=sum(1 for outcome in tuned.outcomes if outcome.seconds),
        seed=seed,
        budget=effort.name + (CUT_SHORT if cut_short else ""),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )

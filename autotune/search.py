"""The search: which configs are tried, in what order, and what is done with what they give.

In `quick` the configs are a function of the key alone, and all of them are tried: noise cannot
change what is compared. In `full` Optuna's sampler goes on from there, or, in a small space, all
configs are tried, the prior's best first.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from .decide import Choice, DecisionRule, choose, untried
from .effort import EFFORTS, EXHAUSTIVE_BELOW, Effort
from .outcome import Outcome
from .pool import Bench, Pool, Screening
from .space import Config, Coverage, PowerOfTwo
from .study import Board, Claim, StorageError
from .tunable import Prepared, Ready, Refused, Tunable
from .worker import WorkerError

SAME_TILE = 3
"""Candidates of the prior that may share a tile, as long as there are others."""

_BATCH = 8  # sampled configs that are compiled together
_SEARCH_SHARE = 0.8  # of the seconds; the rest is the decision's
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search is.

    Attributes:
        phase: "search" or "decision".
        done: candidates tried, or rounds of the decision.
        total: candidates at most; 0 where it is not known before.
        best: the best ratio to the default so far.
        config: that has it.
        seconds_left: until the deadline.
    """

    phase: str
    done: int
    total: int
    best: float | None
    config: Config | None
    seconds_left: float


@dataclass(frozen=True)
class Tuned:
    """What tuning a key came to.

    Attributes:
        choice: what to use.
        outcomes: of every candidate, in canonical order, with the reason of each that failed.
        study: its name in the storage.
        coverage: of the space by what was run or refused.
        notes: what the user should know: interrupted, out of time, a storage lost.
        interrupted: whether Ctrl-C ended it.
    """

    choice: Choice
    outcomes: tuple[Outcome, ...]
    study: str
    coverage: Coverage
    notes: tuple[str, ...] = ()
    interrupted: bool = False


def quick_candidates(
    tunable: Tunable, neighbours: Sequence[Config] = (), *, limit: int = sys.maxsize
) -> tuple[Config, ...]:
    """The candidates that are a function of the key, and of what neighbours won with.

    The default first, then those that are always tried, then the neighbours' winners that are valid
    here, then the prior's best, at most `SAME_TILE` of one tile (the values of the powers of two)
    as long as there are others. In this order a search that is cut short has tried the likeliest.

    Args:
        tunable: gives the space, the default, what is always tried, and the prior.
        neighbours: configs of other keys, the nearest first.
        limit: how many at most.
    """
    asked = (*tunable.pinned, *neighbours)
    first = dict.fromkeys([tunable.default, *filter(tunable.space.contains, asked)])
    return tuple(dict.fromkeys([*first, *_spread(tunable, tuple(first))]))[:limit]


def _spread(tunable: Tunable, first: Sequence[Config]) -> list[Config]:
    """All valid configs by the prior; those of a tile that is full come after all others."""
    tile_names = [p.name for p in tunable.space.parameters if isinstance(p, PowerOfTwo)]
    tiles = Counter(tuple(config[name] for name in tile_names) for config in first)
    ranked = sorted(tunable.space.configs(), key=tunable.prior)  # stable: ties stay canonical
    early: list[Config] = []
    late: list[Config] = []
    for config in ranked:
        tile = tuple(config[name] for name in tile_names)
        full = bool(tile_names) and tiles[tile] >= SAME_TILE
        (late if full else early).append(config)
        tiles[tile] += config not in first
    return early + late


def study_name(tunable: Tunable, tag: str = "") -> str:
    """The name of the study of a key; `tag` is for what must not be mixed: the conditions."""
    return "-".join(part for part in (tunable.name, tunable.key.digest[:16], tag) if part)


def tune(
    tunable: Tunable,
    effort: Effort,
    pool: Pool,
    *,
    store_neighbours: Sequence[Config] = (),
    seed: int = 0,
    storage: str | Path | None = None,
    storage_fallback: bool = False,
    resume: bool = False,
    tag: str = "",
    deadline: float | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    rule: DecisionRule | None = None,
) -> Tuned:
    """Find the fastest correct config of a key. A bad candidate is marked, and ends nothing.

    Ctrl-C, the deadline and `stop` end the search; what is known is decided on all the same.

    Args:
        tunable: what is tuned.
        effort: what may be spent.
        pool: where candidates run.
        store_neighbours: winners of neighbouring keys, the nearest first.
        seed: of the sampler, where one is used.
        storage: as `study.open_storage` takes it. A study that is there is joined, and what it
            knows is not measured again.
        storage_fallback: go on in memory, with a note, where the storage does not answer.
        resume: the processes that left claims in the study are gone: try those configs again.
        tag: of the conditions, for the name of the study.
        deadline: by `time.monotonic`, where it is earlier than the effort's seconds.
        progress: called after each candidate and each round of the decision.
        stop: asked between candidates and rounds.
        rule: of the decision.

    Raises:
        StorageError: the storage does not answer at the start.
        WorkerError: no worker starts, and nothing is known.
    """
    name = study_name(tunable, tag)
    if not effort.measures:
        why = f"effort {effort.name} measures nothing"
        if effort.name not in EFFORTS:
            why = "the budget is zero, so nothing was measured"
        return Tuned(untried(tunable, why), (), name, tunable.space.coverage(()), (why,))
    board, notes = _board(tunable, name, storage, storage_fallback, seed, resume)
    seconds = effort.seconds
    if deadline is not None:
        seconds = min(seconds, deadline - time.monotonic())
    run = _Run(tunable, effort, pool, board, seconds, progress, stop, rule)
    run.notes += notes
    run.search(store_neighbours)
    choice = run.decide()
    known = sorted(run.outcomes.values(), key=lambda o: tunable.space.index(o.config))
    return Tuned(
        choice,
        tuple(known),
        name,
        tunable.space.coverage(run.outcomes),
        tuple(run.notes),
        run.interrupted,
    )


def _board(
    tunable: Tunable,
    name: str,
    storage: str | Path | None,
    fallback: bool,
    seed: int,
    resume: bool,
) -> tuple[Board, list[str]]:
    facts = {"problem": tunable.key.to_json(), "default": tunable.default.to_json()}
    try:
        board = Board(
            storage,
            name,
            tunable.space,
            seed=seed,
            resume=resume,
            prior=tunable.prior,
            facts=facts,
        )
        return board, []
    except StorageError as error:
        if not fallback:
            raise
        return Board(None, name, tunable.space, seed=seed), [f"tuned in memory: {error}"]


class _Run:
    """One call of `tune`."""

    def __init__(
        self,
        tunable: Tunable,
        effort: Effort,
        pool: Pool,
        board: Board,
        seconds: float,
        progress: Callable[[Progress], None],
        stop: Callable[[], bool],
        rule: DecisionRule | None,
    ) -> None:
        self.tunable, self.effort, self.board = tunable, effort, board
        self.rule = rule or DecisionRule(
            effort.band, effort.leave, finalists=effort.finalists, looks=effort.looks
        )
        screening = Screening(rounds=effort.rounds, band=self.rule.finalist_band)
        self.bench = Bench(pool, tunable, screening)
        self.start = time.monotonic()
        self.seconds = seconds
        self.progress, self.asked_to_stop = progress, stop
        self.outcomes: dict[Config, Outcome] = {}
        self.prepared: dict[Config, Prepared] = {}
        self.held: list[Claim] = []
        self.notes: list[str] = []
        self.interrupted = False
        self.samples = False
        self.total = effort.trials

    def search(self, neighbours: Sequence[Config]) -> None:
        """Try candidates until there are none, or no time; it keeps what is known in any case."""
        try:
            self._searched(neighbours)
        except KeyboardInterrupt:
            self.interrupted = True
            self.notes.append("interrupted: decided on what was known")
        except (StorageError, WorkerError) as error:
            if isinstance(error, WorkerError) and not self.outcomes:
                raise
            self.notes.append(f"the search ended early: {error}")
        finally:
            with suppress(StorageError):
                for claim in self.held:
                    self.board.release(claim)

    def decide(self) -> Choice:
        """Choose among what is known; in one process of those that share the study."""
        candidates = self._representatives()
        try:
            self.bench.refresh()
            if self.board.shared and not self._must_decide():
                task = f"decision of {len(candidates)}"
                with suppress(StorageError):
                    found = self.board.once(
                        task, lambda: self._choose(candidates).to_json(), self._must_decide
                    )
                    return Choice.from_json(found)
            return self._choose(candidates)
        except KeyboardInterrupt:
            self.interrupted = True
            self.notes.append("interrupted: decided on the first measurement")
            return self._choose(candidates)

    def _choose(self, candidates: Sequence[Outcome]) -> Choice:
        rounds = 0

        def measure(configs: Sequence[Config]) -> dict[Config, float]:
            nonlocal rounds
            self._prepare(configs)  # another host may have compiled them
            try:
                found = self.bench.times(configs)
            except WorkerError as error:
                self.notes.append(f"decided on the first measurement: {error}")
                return {}
            rounds += 1
            self._report("decision", rounds, self.rule.looks[-1])
            return found

        return choose(self.tunable, measure, candidates, self.rule, stop=self._must_decide)

    def _searched(self, neighbours: Sequence[Config]) -> None:
        self._learn()
        default = self.outcomes.get(self.tunable.default)
        if default is not None and not default.ok:
            self.bench.reference = None
        candidates = self._candidates(neighbours)
        self._prepare(candidates)
        self.board.enqueue(self._distinct(candidates))
        while not self._over():
            self.held = self._claims()
            if not self.held:
                if not self.board.others() and not self.board.waiting():
                    break
                time.sleep(_POLL_SECONDS)  # who tries it may leave, and then it is ours to try
            while self.held and not self._over():
                claim = self.held[0]
                outcome = self._tried(claim.config)
                self.outcomes[claim.config] = outcome
                self.board.tell(claim, outcome)
                self.held.pop(0)
                self._report("search", len(self.outcomes), self.total)
            self._learn()
        else:
            self.notes.append("the search ended early: out of time, or asked to stop")
        self._learn()  # what others ended just now
        for config in candidates:
            if config not in self.outcomes and (twin := self._twin_of(config)) is not None:
                self.outcomes[config] = twin

    def _candidates(self, neighbours: Sequence[Config]) -> tuple[Config, ...]:
        space, effort = self.tunable.space, self.effort
        limit = effort.allowed(space)
        goes_on = effort.trials > effort.candidates
        if goes_on and space.count() <= EXHAUSTIVE_BELOW:
            limit = effort.trials
        found = quick_candidates(self.tunable, neighbours, limit=limit)
        self.samples = goes_on and len(found) < min(effort.trials, space.count())
        self.total = min(effort.trials, space.count()) if self.samples else len(found)
        return found

    def _claims(self) -> list[Claim]:
        if (claim := self.board.claim()) is not None:
            return [claim]
        claims: list[Claim] = []
        if self.samples:
            up_to = self.total
            while len(claims) < _BATCH and (claim := self.board.claim(sample_up_to=up_to)):
                claims.append(claim)
            self._prepare([claim.config for claim in claims])
        return claims

    def _tried(self, config: Config) -> Outcome:
        self._prepare([config])
        prepared = self.prepared[config]
        if isinstance(prepared, Refused):
            return Outcome(config, "refused", prepared.reason)
        if (twin := self._twin_of(config)) is not None:
            return twin
        return self.bench.screen(config, best=self._best()[0], digest=prepared.digest)

    def _prepare(self, configs: Sequence[Config]) -> None:
        """Compile those that are not, together; if that raises, each alone, to know whose it is."""
        missing = [config for config in configs if config not in self.prepared]
        if not missing:
            return
        try:
            found = self.tunable.prepare(missing)
        except Exception as error:
            if len(missing) > 1:
                for config in missing:
                    self._prepare([config])
                return
            found = {missing[0]: Refused(f"{type(error).__name__}: {error}")}
        never = Refused("its compilation gave no answer")
        self.prepared.update((config, found.get(config, never)) for config in missing)

    def _distinct(self, configs: Sequence[Config]) -> list[Config]:
        """The first of each binary."""
        first: dict[str, Config] = {}
        found = []
        for config in configs:
            prepared = self.prepared[config]
            if isinstance(prepared, Refused) or config == first.setdefault(prepared.digest, config):
                found.append(config)
        return found

    def _twin_of(self, config: Config) -> Outcome | None:
        """What is known of the binary of a config, by another config."""
        prepared = self.prepared[config]
        if isinstance(prepared, Ready):
            for other in self.outcomes.values():
                if other.digest == prepared.digest:
                    reason = "; ".join(
                        filter(None, (f"the same binary as {other.config}", other.reason))
                    )
                    return replace(other, config=config, reason=reason)
        return None

    def _representatives(self) -> list[Outcome]:
        """One outcome for each binary: the default's, or the first in canonical order."""
        index, default = self.tunable.space.index, self.tunable.default
        ordered = sorted(
            self.outcomes.values(), key=lambda o: (o.config != default, index(o.config))
        )
        seen: set[str] = set()
        found = []
        for outcome in ordered:
            if outcome.digest not in seen or not outcome.digest:
                found.append(outcome)
            seen.add(outcome.digest)
        return found

    def _learn(self) -> None:
        if not self.board.shared:
            return
        known = self.board.known()
        self.outcomes.update((c, o) for c, o in known.items() if self.tunable.space.contains(c))

    def _best(self) -> tuple[float | None, Config | None]:
        rows = [(o.ratio, o.config) for o in self.outcomes.values() if o.ok and not o.stopped]
        return min(rows, key=lambda row: row[0] or 0.0, default=(None, None))

    def _left(self, share: float) -> float:
        return self.start + self.seconds * share - time.monotonic()

    def _over(self) -> bool:
        return self._left(_SEARCH_SHARE) <= 0 or self.asked_to_stop()

    def _must_decide(self) -> bool:
        return self.interrupted or self._left(1.0) <= 0 or self.asked_to_stop()

    def _report(self, phase: str, done: int, total: int) -> None:
        best, config = self._best()
        self.progress(Progress(phase, done, total, best, config, max(0.0, self._left(1.0))))

"""A suite, timed: engines of old and new, the sequential rule over pairs, and a row a series."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ....autotune.rule import Decision, Measure, Rule, RuleState, SeriesSpec, run_rule
from ....autotune.verdicts import Verdict
from ....errors import UsageError
from ....formats.atomic import write_atomic
from ....settings import current
from ....targets import Target
from ..checkout import Checkout
from ..gates import Gate
from ..model import Row
from ..suite import ModelCase, Suite
from .engines import EngineCase, prepare_engine
from .pairs import EnginePair, TimedPairs, TimedSeries

Advance = Callable[[str, float], None]
RULE = Rule(threshold=0.03, looks=(20, 32, 48, 72))
TIER = 3
RESERVED = 0.3
"""The share of the budget that is kept for confirming what the first run suspects."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What came of timing.

    Attributes:
        rows: one a series.
        device: name of the GPU.
        versions: of what may move the figures.
        clocks: of the GPU, when it was ready.
        seconds: that the GPU was held, engines made before.
        pairs: that were measured, by series.
    """

    rows: tuple[Row, ...]
    device: str
    versions: Mapping[str, str]
    clocks: Mapping[str, int]
    seconds: float
    pairs: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)


def time_suite(
    suite: Suite,
    old: Checkout,
    new: Checkout,
    *,
    only: Sequence[str] | None = None,
    rule: Rule = RULE,
    budget: float = 60.0,
    seed: int = 0,
    advance: Advance = lambda phase, share: None,
) -> Timed:
    """Times every case of the suite that asks for it and names this machine's device.

    A run that was interrupted goes on where it ended.

    Args:
        suite: its models with ``timed``.
        old, new: checkouts to compare.
        only: names of cases.
        rule: how sure a verdict must be.
        budget: seconds of measuring, the start of the process included; a confirmation may add the
            start of another.
        seed: of every order that is drawn.
        advance: told what runs.

    Raises:
        UsageError: no GPU, or nothing to time on it.
        EngineError: a case that one side does not compile, or a process that dies.
    """
    pairs = prepare_pairs(suite, old, new, only, advance)
    job = _Job(suite, rule, budget, seed, pairs, old, new, advance)
    return job.run()


def prepare_pairs(
    suite: Suite,
    old: Checkout,
    new: Checkout,
    only: Sequence[str] | None = None,
    advance: Advance = lambda phase, share: None,
) -> list[EnginePair]:
    """Engines of both sides for every timed case of this device, compiled if need be."""
    target, cases = timed_cases(suite, only)
    before, after = old.digest, new.digest
    sides = {before: old, after: new}  # the same code compiles the same
    made: list[EnginePair] = []
    for index, case in enumerate(cases):
        advance(f"compiling {case.name}", 0.2 * index / len(cases))
        engine_case = _engine_case(case, target)
        with ThreadPoolExecutor(2) as pool:  # each waits for a process of its own
            folders = pool.map(
                lambda digest, wanted=engine_case: prepare_engine(sides[digest], wanted, digest),
                sides,
            )
            engines = dict(zip(sides, folders, strict=True))
        timed = set(case.timed)
        made.append(
            EnginePair(
                case.name,
                target,
                case.owner,
                str(engines[before]),
                str(engines[after]),
                "kernels" in timed,
                "phases" in timed,
            )
        )
    return made


def timed_cases(suite: Suite, only: Sequence[str] | None = None) -> tuple[str, list[ModelCase]]:
    """This machine's device, and the cases of a suite that are timed on it.

    Raises:
        UsageError: no GPU, or no such case.
    """
    target = _device(suite)
    cases = [case for case in suite.chosen(only) if isinstance(case, ModelCase) and case.timed]
    if found := [case for case in cases if target in case.targets]:
        return target, found
    others = ", ".join(f"{case.name} for {', '.join(case.targets)}" for case in cases)
    raise UsageError(
        f"suite {suite.name}",
        expected=f'a model with timed = ["kernels", "phases"] and target "{target}"',
        found=f"only {others}" if others else "none",
        remedy="Add one, or run tiers 1 and 2 alone: leave --gpu out.",
    )


def _device(suite: Suite) -> str:
    """The name of this machine's GPU in the table of targets."""
    target = Target.detect()
    if target.is_cpu:
        raise UsageError(
            f"suite {suite.name}",
            expected="a CUDA device, to time on",
            found="none that torch sees",
            remedy="Run it on a machine with a GPU, or leave --gpu out: tiers 1 and 2 need none.",
        )
    return target.name


def _engine_case(case: ModelCase, target: str) -> EngineCase:
    model = str(case.path) if case.path is not None else str(_config_folder(case))
    options = ["--dtype", case.dtype, "--max-batch-size", str(case.max_batch_size)]
    if case.max_model_len is not None:
        options += ["--max-model-len", str(case.max_model_len)]
    if case.path is None:
        options += ["--random-weights", "0"]
    options += ["--weights", "reference", "--verify", "structure"]
    return EngineCase(case.name, model, options, target, case.definition)


def _config_folder(case: ModelCase) -> Path:
    """A folder with the case's config.json, which stays: engines refer to it."""
    assert case.config is not None
    text = json.dumps(dict(case.config), indent=1, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = current().cache / "regress" / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", text)
    return folder


@dataclass
class _Job:
    """One timing of a suite: its processes, its state on disk, its rows."""

    suite: Suite
    rule: Rule
    budget: float
    seed: int
    pairs: Sequence[EnginePair]
    old: Checkout
    new: Checkout
    advance: Advance
    started: float = 0.0
    confirming_since: float | None = None

    def run(self) -> Timed:
        self.started = time.monotonic()
        with ExitStack() as stack:
            self.advance("starting", 0.2)
            timed = stack.enter_context(TimedPairs(self.pairs, self.old, self.new, self.seed))
            specs = {name: self._spec(series) for name, series in timed.series.items()}
            path = self._state_path(specs)

            def confirm() -> Measure:
                timed.close()  # its memory is needed
                suspects = [name for name in state.second]
                self.advance(f"confirming {len(suspects)}", 0.9)
                again = TimedPairs(self.pairs, self.old, self.new, self.seed + 1, suspects)
                self.confirming_since = time.monotonic()
                return stack.enter_context(again).measure

            state = _read_state(path, self.rule, specs) or RuleState(self.rule)
            decisions = run_rule(
                specs,
                timed.measure,
                self.rule,
                confirm=confirm,
                out_of_budget=lambda: self._is_over(state, specs),
                state=state,
                on_round=lambda now: self._keep(path, now),
            )
        path.unlink(missing_ok=True)
        rows = [
            self._row(timed.series[name], self._heard(found, name, state))
            for name, found in decisions.items()
        ]
        device = timed.device
        return Timed(
            (*rows, *(self._skipped(name, reason) for name, reason in timed.skipped.items())),
            device["name"],
            device["versions"],
            device["clocks"],
            self._spent(),
            state.first,
        )

    def _is_over(self, state: RuleState, specs: Mapping[str, SeriesSpec]) -> bool:
        """Whether the budget is spent. Where something looks slower the first run leaves a share of
        it for the second, which has that share whatever else took time: a suspicion that nobody
        looked into would pass.
        """
        kept = self.budget * RESERVED
        if state.phase == "second":
            since = self.confirming_since
            return since is not None and time.monotonic() - since >= kept
        suspicious = any(self._looks_slower(specs[name], p) for name, p in state.first.items())
        return self._spent() >= (self.budget - kept if suspicious else self.budget)

    def _looks_slower(self, spec: SeriesSpec, pairs: Sequence[tuple[float, float]]) -> bool:
        if len(pairs) < self.rule.looks[0]:
            return False
        ratio = statistics.median(new / old for old, new in pairs)
        worse = ratio if spec.better == "lower" else 1 / ratio
        return worse > 1 + (spec.threshold or self.rule.threshold) / 2

    def _spent(self) -> float:
        return time.monotonic() - self.started

    def _keep(self, path: Path, state: RuleState) -> None:
        rounds = max((len(pairs) for pairs in state.first.values()), default=0)
        self.advance(f"round {rounds}", 0.25 + 0.6 * rounds / self.rule.looks[-1])
        write_atomic(path, json.dumps(state.as_json()))

    def _state_path(self, specs: Mapping[str, SeriesSpec]) -> Path:
        """One file for one question: what would give other pairs has another name."""
        question = {
            "pairs": [asdict(pair) for pair in self.pairs],
            "code": [self.old.digest, self.new.digest],
            "rule": asdict(self.rule),
            "seed": self.seed,
            "series": {name: asdict(spec) for name, spec in specs.items()},
        }
        name = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:24]
        folder = current().cache / "regress" / "timing"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.json"

    def _heard(self, found: Decision, name: str, state: RuleState) -> Decision:
        """The decision; a series that was not measured as often as a look needs, in the run that
        had to decide, is missing, which fails. Noise may leave something open; a budget that is
        too small may not, and least of all a suspicion.
        """
        second = name in state.second
        rounds, needed = len((state.second if second else state.first)[name]), self.rule.looks[0]
        if found.verdict is not Verdict.UNDECIDABLE or rounds >= needed:
            return found
        suspicion = f"{found.note}; " if second else ""
        note = f"{suspicion}{rounds} of {needed} rounds within the budget: raise --budget"
        return replace(found, verdict=Verdict.MISSING, note=note)

    def _gate(self, series: TimedSeries) -> float:
        """The slow-down that must be found; the rule's own where the suite allows anything."""
        gate: Gate = self.suite.rule(series.subject, series.series)[1]
        return gate.allowed if gate.relative and 0 < gate.allowed < 1 else self.rule.threshold

    def _spec(self, series: TimedSeries) -> SeriesSpec:
        return SeriesSpec(series.better, self._gate(series))

    def _row(self, series: TimedSeries, found: Decision) -> Row:
        return Row(
            TIER,
            series.pair.case,
            series.pair.target,
            series.subject,
            series.series,
            series.pair.owner,
            series.unit,
            series.better,
            found.old,
            found.new,
            f"{100 * self._gate(series):g}%",
            found.verdict,
            found.ratio,
            found.note,
        )

    def _skipped(self, name: str, reason: str) -> Row:
        """A series that is not timed is shown with why; tier 1 has what became of its kernel."""
        place, _, rest = name.partition("/")
        subject, _, series = rest.rpartition("/")
        case, _, target = place.rpartition(".")
        owner = next(p.owner for p in self.pairs if (p.case, p.target) == (case, target))
        return Row(
            TIER, case, target, subject, series, owner, "s", "lower", None, None, "any",
            Verdict.CHANGED, None, f"not timed: {reason}",
        )  # fmt: skip


def _read_state(path: Path, rule: Rule, specs: Mapping[str, SeriesSpec]) -> RuleState | None:
    """The state of an interrupted run of the same question, if there is one that can be used."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        state = RuleState.from_json(data)
    except (OSError, ValueError, UsageError):
        return None
    same = state.rule == rule and set(state.first) == set(specs)
    return state if same and state.phase != "done" else None

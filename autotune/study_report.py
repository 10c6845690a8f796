"""What a storage of studies tells of each search: its course, what mattered, what failed.

Only what is stored is read, so a report needs neither the kernel nor the device, and takes studies
of any effort, of one process or of several, ended or under way.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import Config
from .coverage import Coverage
from .decide import Choice
from .outcome import Outcome
from .study import StorageError, answering, open_storage

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

ENOUGH = 20
"""Configs with times from which an importance says something: it compares the best tenth to all."""

TOO_FEW = "too few trials"
_LEAST_PAIRS = 5  # predictions whose order says something


@dataclass(frozen=True, slots=True)
class Tried:
    """One config that was tried.

    Attributes:
        number: of its trial.
        outcome: what became of it.
        predicted: seconds that the prior expected; None in studies that do not say.
        process: who tried it.
    """

    number: int
    outcome: Outcome
    predicted: float | None
    process: str

    @property
    def ratio(self) -> float | None:
        """Its time over the default's; None where it is not correct, or has no times."""
        return self.outcome.ratio if self.outcome.ok else None


@dataclass(frozen=True)
class StudyReport:
    """One study.

    Attributes:
        name: in the storage.
        problem: the key's fields; {} where it does not say.
        default: the untuned config; None where it does not say.
        tried: in the order of their numbers.
        running, waiting: trials that someone has claimed, or that nobody has taken yet.
        coverage: of the space; None where the study does not say what its space is.
        importances: the share of each parameter in what makes a config fast, the largest first; {}
            where there are fewer than ENOUGH, or too much alike, to tell.
        choice: the last decision; None where there was none that was shared.
    """

    name: str
    problem: Mapping[str, Any]
    default: Config | None
    tried: tuple[Tried, ...]
    running: int
    waiting: int
    coverage: Coverage | None
    importances: Mapping[str, float]
    choice: Choice | None

    @property
    def history(self) -> list[tuple[int, float]]:
        """Number and ratio of each trial that was the best until then."""
        found: list[tuple[int, float]] = []
        for one in self.tried:
            if one.ratio is not None and (not found or one.ratio < found[-1][1]):
                found.append((one.number, one.ratio))
        return found

    @property
    def best(self) -> Tried | None:
        """The one with the lowest ratio."""
        timed = [one for one in self.tried if one.ratio is not None]
        return min(timed, key=lambda one: one.ratio or math.inf, default=None)

    @property
    def predictions(self) -> list[tuple[float, float]]:
        """Seconds predicted and measured, of each config that has both."""
        return [
            (one.predicted, one.outcome.median)
            for one in self.tried
            if one.outcome.ok and one.predicted is not None and one.outcome.median is not None
        ]

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, of predicted and measured; None for too few, or no order in them."""
        pairs = self.predictions
        if len(pairs) < _LEAST_PAIRS or any(
            len(set(side)) < 2 for side in zip(*pairs, strict=True)
        ):
            return None
        return statistics.correlation(*(_ranks(side) for side in zip(*pairs, strict=True)))

    @property
    def failures(self) -> Mapping[str, Sequence[Tried]]:
        """Those that could not be chosen, by status, the most frequent first."""
        failed = [one for one in self.tried if not one.outcome.ok]
        counts = Counter(one.outcome.status for one in failed)
        return {
            status: [one for one in failed if one.outcome.status == status]
            for status, _ in counts.most_common()
        }

    @property
    def processes(self) -> int:
        """How many took part."""
        return len({one.process for one in self.tried})

    def to_json(self) -> dict[str, Any]:
        """Plain data that `json` writes."""
        return {
            "name": self.name,
            "problem": dict(self.problem),
            "default": self.default and self.default.to_json(),
            "running": self.running,
            "waiting": self.waiting,
            "processes": self.processes,
            "history": self.history,
            "importances": dict(self.importances) or None,
            "importances_note": "" if self.importances else TOO_FEW,
            "coverage": self.coverage and self.coverage.to_json(),
            "rank_correlation": self.rank_correlation,
            "choice": self.choice and self.choice.to_json(),
            "failed": {
                status: [
                    {"config": o.outcome.config.to_json(), "reason": o.outcome.reason} for o in ones
                ]
                for status, ones in self.failures.items()
            },
            "tried": [
                {
                    "number": one.number,
                    "ratio": one.ratio,
                    "seconds": one.outcome.median,
                    "predicted": one.predicted,
                    "stopped": one.outcome.stopped,
                    "status": one.outcome.status,
                    "config": one.outcome.config.to_json(),
                }
                for one in self.tried
            ],
        }


def read_studies(storage: str | Path) -> list[StudyReport]:
    """A report of each study in a storage, by name.

    Args:
        storage: as `open_storage` takes it; nothing is made that is not there.

    Raises:
        StorageError: it is not there, does not answer, is no storage, or holds no studies of the
            tuner.
    """
    import optuna

    opened = open_storage(storage, create=False)
    where = str(storage)
    with answering(where):
        names = sorted(study.study_name for study in opened.get_all_studies())
        studies = [optuna.load_study(study_name=name, storage=opened) for name in names]
        found = [report for study in studies if (report := _report(study)) is not None]
    if not found:
        raise StorageError(
            f"storage {where}",
            expected="studies that tilewright tune --storage made",
            found="no studies" if not names else f"others: {', '.join(names[:3])}",
            remedy="Name the storage of a tuning run.",
        )
    return found


def _report(study: Study) -> StudyReport | None:
    """The report of a study; None for one that is not the tuner's."""
    trials = study.get_trials(deepcopy=False)
    facts = study.user_attrs
    ended = [trial for trial in trials if "outcome" in trial.user_attrs]
    rows = [_tried(trial) for trial in ended]
    ours = any("config" in trial.user_attrs for trial in trials)
    if not ours and "space" not in facts:
        return None
    states = Counter(t.state.name for t in trials if "task" not in t.user_attrs)
    decided = [t.user_attrs["result"] for t in trials if "result" in t.user_attrs]
    timed = [(t, r.ratio) for t, r in zip(ended, rows, strict=True) if r.ratio is not None]
    default = facts.get("default")
    return StudyReport(
        study.study_name,
        facts.get("problem", {}),
        None if default is None else Config.from_json(default),
        tuple(rows),
        states["RUNNING"],
        states["WAITING"],
        _coverage(facts.get("space"), [row.outcome.config for row in rows]),
        _importances(timed),
        Choice.from_json(decided[-1]) if decided else None,
    )


def _tried(trial: FrozenTrial) -> Tried:
    by = trial.user_attrs.get("by", {})
    return Tried(
        trial.number,
        Outcome.from_json(trial.user_attrs["outcome"]),
        trial.user_attrs.get("prior"),
        f"{by.get('host', '')}:{by.get('pid', '')}",
    )


def _coverage(space: Mapping[str, Any] | None, tried: Sequence[Config]) -> Coverage | None:
    if space is None:
        return None
    configs = set(tried)
    by_parameter = tuple(
        (name, tuple((value, _having(configs, name, value)) for value in values))
        for name, values in space["parameters"].items()
    )
    return Coverage(len(configs), space["valid"], by_parameter)


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1; those that are equal share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    shared: list[float] = (np.cumsum(counts) - (counts - 1) / 2)[places].tolist()
    return shared


def _having(configs: Iterable[Config], name: str, value: object) -> int:
    found = (config.get(name) for config in configs)
    return sum(type(other) is type(value) and other == value for other in found)


def _importances(timed: Sequence[tuple[FrozenTrial, float]]) -> dict[str, float]:
    """PED-ANOVA over all configs that have times, also those that were stopped early: Optuna takes
    completed trials alone, and most of ours are pruned.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState, create_trial

    if len(timed) < ENOUGH or len({ratio for _, ratio in timed}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Optuna calls experimental
        whole = optuna.create_study()
        for trial, ratio in timed:
            whole.add_trial(
                create_trial(
                    state=TrialState.COMPLETE,
                    params=trial.params,
                    distributions=trial.distributions,
                    value=ratio,
                )
            )
        found = get_param_importances(whole, evaluator=PedAnovaImportanceEvaluator())
    return dict(found) if all(map(math.isfinite, found.values())) else {}

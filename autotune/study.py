"""The study that processes share: who tries which config, and what became of it. Optuna's storages.

A config is claimed by making its trial RUNNING, which the storages do atomically; trials have
numbers in an order that all agree on, and of two trials of one config the lower number counts. A
sampled config is known only after its trial has a number, so whoever asks waits until every lower
number has said what it is for (Lamport, A new solution of Dijkstra's concurrent programming
problem, 1974, has the same doorway). So nothing is measured twice, whoever joins and leaves.

A claim is given up where its process, on this machine, is gone, or where it is older than any
candidate takes. Trials that have no times (refused, wrong, crashed) are told as pruned, not as
failed: Optuna's samplers learn from the former to look elsewhere, and forget the latter. Failed are
those that say nothing about their config: interrupted, abandoned.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TilewrightError, UsageError
from .outcome import Outcome
from .space import Config, Space

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

ANSWER_SECONDS = 5.0
"""How long a storage server may take to answer at first."""

_CLAIM_SECONDS = 600.0  # older claims are given up: more than all limits of a candidate together
_DOORWAY_SECONDS = 30.0  # a trial that has not said by then what it is for never will
_POLL_SECONDS = 0.02  # between looks at who has said what it is for
_WAIT_SECONDS = 0.1  # between looks at whether another has done a task
_DRAWS = 50  # samples in a row that are nothing new: the sampler has no more to give


class StorageError(UsageError):
    """A storage of studies that does not answer, or that cannot be read or written."""


def open_storage(storage: str | Path | None, *, create: bool = True) -> BaseStorage:
    """Optuna's storage of a path or URL.

    Args:
        storage: None: memory, for this process alone. A path: a journal file, for the processes of
            one host. "grpc://host:port": Optuna's gRPC proxy. Another URL: a database.
        create: whether a file that is not there may be made.

    Raises:
        StorageError: it does not answer, cannot be read or written, or its driver is missing.
    """
    from optuna import logging, storages

    if not create:
        _check_there(str(storage))

    if logging.get_verbosity() == logging.INFO:  # its default: a line for each trial
        logging.set_verbosity(logging.WARNING)
    if storage is None:
        return storages.InMemoryStorage()
    text = str(storage)
    with answering(text), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Optuna calls experimental
        scheme, separator, rest = text.partition("://")
        if not separator:
            from optuna.storages.journal import JournalFileBackend

            # The lock would wait for a folder that cannot be written.
            with open(text, "ab" if create else "rb"):
                pass
            return storages.JournalStorage(JournalFileBackend(text))
        if scheme == "grpc":
            host, _, port = rest.rstrip("/").rpartition(":")
            proxy = storages.GrpcStorageProxy(host=host.strip("[]"), port=int(port))
            proxy.wait_server_ready(timeout=ANSWER_SECONDS)
            return proxy
        slow = scheme.startswith(("postgres", "mysql"))
        connect = {"connect_timeout": int(ANSWER_SECONDS)} if slow else {}
        return storages.RDBStorage(
            text, engine_kwargs={"connect_args": connect}, skip_table_creation=not create
        )


def _check_there(storage: str) -> None:
    """StorageError for a file, also one of SQLite, that does not exist: opening would make it."""
    scheme, separator, rest = storage.partition("://")
    path = rest.removeprefix("/") if separator else storage
    is_file = not separator or scheme.startswith("sqlite")
    if is_file and path and not Path(path).exists():
        raise StorageError(
            f"storage {storage}",
            expected="a journal file or a database that a tuning run has made",
            found=f"no file {path}",
            remedy="Name what --storage was given then.",
        )


@contextmanager
def answering(where: str) -> Iterator[None]:
    """Whatever a storage raises within, as one error: its drivers have dozens of their own."""
    try:
        yield
    except (TilewrightError, KeyboardInterrupt):
        raise
    except Exception as error:
        internal = type(error).__name__ == "StorageInternalError"  # its own words say nothing
        cause = error.__cause__ if internal and error.__cause__ is not None else error
        words = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        if "://" not in where and isinstance(error, (ValueError, KeyError, TypeError)):
            words = f"a file that is no journal ({words})"
        raise StorageError(
            f"storage {where}",
            expected="a journal file, a database or a gRPC proxy that answers",
            found=words,
            remedy="Start it or correct its name; without a storage, tuning is of this process.",
        ) from error


@dataclass(frozen=True)
class Claim:
    """A config that this process alone tries.

    Attributes:
        trial: of Optuna.
        config: to be tried.
    """

    trial: Trial
    config: Config


class Board:
    """One study of one key.

    Args:
        storage: as `open_storage` takes it.
        name: of the study; it is joined where it exists.
        space: of its configs.
        seed: of the sampler. In a shared study each process has one of its own, made of it.
        resume: whether all claims of others are given up: they are of a run that has ended.
        prior: seconds that are expected of a config, kept with its outcome.
        facts: kept with the study, beside its space: what JSON can hold.

    Raises:
        StorageError: now or in any method, where the storage does not answer.
    """

    def __init__(
        self,
        storage: str | Path | None,
        name: str,
        space: Space,
        *,
        seed: int = 0,
        resume: bool = False,
        prior: Callable[[Config], float] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        import optuna

        self.name, self.space, self.resume, self.prior = name, space, resume, prior
        self.shared = storage is not None
        self.where = str(storage) if storage is not None else "memory"
        self._token = uuid.uuid4().hex
        self._mine: set[int] = set()
        self._read: dict[int, Outcome] = {}
        mixed = f"{seed}" + (f"/{self._token}" if self.shared else "")
        sampler = optuna.samplers.TPESampler(seed=zlib.crc32(mixed.encode()))
        opened = open_storage(storage)
        with answering(self.where):
            self.study: Study = optuna.create_study(
                storage=opened, study_name=name, sampler=sampler, load_if_exists=True
            )
            if resume:
                self._inherited = {t.number for t in self._trials() if _running(t)}
            else:
                self._inherited = set()
            if self.shared:
                self._describe(facts or {})

    def enqueue(self, configs: Sequence[Config]) -> None:
        """Add the configs that the study lacks, in this order."""
        with answering(self.where):
            known = {_text(t) for t in self._trials() if not _failed(t)}
            for config in configs:
                if str(config) not in known:
                    self._enqueue(config)

    def claim(self, *, sample_up_to: int = 0) -> Claim | None:
        """The next config that nobody else has; None: there is none.

        Args:
            sample_up_to: once all that was enqueued is taken, new ones are drawn, until so many
                are taken by all processes together.
        """
        with answering(self.where):
            draws = 0
            while draws < _DRAWS:
                if not any(_waiting(t) for t in self._trials()):
                    if self._taken() >= sample_up_to:
                        return None
                    draws += 1
                trial = self.study.ask()
                self._mine.add(trial.number)
                try:
                    if (claim := self._claimed(trial, sample_up_to)) is not None:
                        return claim
                except BaseException:
                    self._tell(trial, "FAIL")
                    raise
            return None

    def tell(self, claim: Claim, outcome: Outcome) -> None:
        """Keep what became of a claim; nothing where it was given to another meanwhile."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        self._mine.discard(claim.trial.number)
        with answering(self.where), suppress(UpdateFinishedTrialError):
            for step, ratio in enumerate(outcome.log_ratios):
                if outcome.reference or outcome.ok:
                    claim.trial.report(math.exp(ratio), step)
            # Before the trial ends: the gRPC proxy reads an ended trial once.
            if self.prior is not None:
                claim.trial.set_user_attr("prior", self.prior(claim.config))
            claim.trial.set_user_attr("outcome", outcome.to_json())
            if outcome.ok and not outcome.stopped:
                values, state = outcome.ratio, TrialState.COMPLETE
            else:
                values, state = None, TrialState.PRUNED
            self.study.tell(claim.trial, values, state=state, skip_if_finished=True)

    def release(self, claim: Claim) -> None:
        """Give up a claim untried: someone else may take it."""
        with answering(self.where):
            self._tell(claim.trial, "FAIL")
            self._enqueue(claim.config)

    def known(self) -> dict[Config, Outcome]:
        """What was tried, by whomever."""
        with answering(self.where):
            for trial in self._trials():
                if trial.number not in self._read and "outcome" in trial.user_attrs:
                    self._read[trial.number] = Outcome.from_json(trial.user_attrs["outcome"])
        return {outcome.config: outcome for outcome in self._read.values()}

    def others(self) -> bool:
        """Whether some other process tries a config now; abandoned ones are given back first."""
        with answering(self.where):
            running = [t for t in self._trials() if _tries(t) and t.number not in self._mine]
            gone = [t for t in running if self._abandoned(t)]
            for trial in gone:
                self._give_back(trial)
            return len(running) > len(gone)

    def waiting(self) -> bool:
        """Whether there is a config that nobody has taken yet."""
        with answering(self.where):
            return any(_waiting(t) for t in self._trials())

    def once(
        self, task: str, work: Callable[[], dict[str, Any]], stop: Callable[[], bool]
    ) -> dict[str, Any]:
        """What `work` gives in the one process that does it; the others wait for it.

        Args:
            task: what is done, the same text in each process.
            work: gives what JSON can hold.
            stop: asked while it waits; then this process does it too.
        """
        mine = self._volunteer(task)
        while (first := self._first(task)) is not None and first.number < mine.number:
            if (result := first.user_attrs.get("result")) is not None:
                self._close(mine)
                return dict(result)
            if stop():
                break
            time.sleep(_WAIT_SECONDS)
        try:
            result = work()
        except BaseException:
            self._close(mine)
            raise
        self._close(mine, result)
        return result

    def _describe(self, facts: Mapping[str, Any]) -> None:
        """Says of the study what its trials do not: for reports, and for Optuna's dashboard."""
        counts = self.space.coverage(()).by_parameter
        values = {name: [value for value, _ in having] for name, having in counts}
        space = {"size": self.space.size, "valid": self.space.count(), "parameters": values}
        described = {**facts, "space": space}
        known = self.study.user_attrs
        for name, value in described.items():
            if name not in known:
                self.study.set_user_attr(name, value)
        if self.study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna calls it experimental
                self.study.set_metric_names(["time over the default's"])

    def _volunteer(self, task: str) -> FrozenTrial:
        """A trial that is no candidate, RUNNING from its creation; it ends as failed."""
        from optuna.trial import TrialState, create_trial

        ticket = uuid.uuid4().hex
        attrs = {"task": task, "ticket": ticket, "by": self._signature()}
        with answering(self.where):
            self.study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=attrs))
            mine = next(t for t in self._trials() if t.user_attrs.get("ticket") == ticket)
        self._mine.add(mine.number)
        return mine

    def _first(self, task: str) -> FrozenTrial | None:
        """The lowest number that does this task or has done it."""
        with answering(self.where):
            for trial in self._trials():
                if trial.user_attrs.get("task") != task:
                    continue
                mine = trial.number in self._mine
                if _running(trial) and not mine and self._abandoned(trial):
                    self._tell(trial.number, "FAIL")
                elif _running(trial) or "result" in trial.user_attrs:
                    return trial
        return None

    def _close(self, trial: FrozenTrial, result: dict[str, Any] | None = None) -> None:
        import optuna

        with answering(self.where):
            if result is not None:
                optuna.Trial(self.study, trial._trial_id).set_user_attr("result", result)
            self._tell(trial.number, "FAIL")

    def _claimed(self, trial: Trial, sample_up_to: int) -> Claim | None:
        enqueued = "config" in trial.user_attrs
        if not enqueued and not sample_up_to:  # another took the last one just before
            self._tell(trial, "FAIL")
            return None
        try:
            config = self.space.suggest(trial)
        except UsageError as error:  # someone enqueued what is none of ours
            trial.set_user_attr("note", str(error))
            self._tell(trial, "FAIL")
            return None
        trial.set_user_attr("by", self._signature())
        trial.set_user_attr("config", config.to_json())
        note = self.space.why_not(config)
        if note is None and self._taken_before(trial, config):
            note = "tried by an earlier trial"
        if note is not None:
            trial.set_user_attr("note", note)
            self._tell(trial, "PRUNED")
            return None
        if not enqueued and self._taken(below=trial.number) >= sample_up_to:
            self._tell(trial, "FAIL")  # others drew at the same time, and with lower numbers
            return None
        return Claim(trial, config)

    def _taken(self, below: int = sys.maxsize) -> int:
        """Configs that were tried, or that someone tries now; of the trials below a number."""
        rows = (t for t in self._trials() if t.number < below)
        return sum("outcome" in t.user_attrs or _tries(t) for t in rows)

    def _taken_before(self, trial: Trial, config: Config) -> bool:
        """Whether a lower number has this config, once all of them have said what they are for."""
        patience = time.monotonic() + _DOORWAY_SECONDS
        while True:
            lower = [t for t in self._trials() if t.number < trial.number and not _failed(t)]
            if any(_text(t) == str(config) for t in lower):
                return True
            silent = [t for t in lower if _tries(t) and _text(t) is None]
            if all(self._abandoned(t) for t in silent) or time.monotonic() > patience:
                return False
            time.sleep(_POLL_SECONDS)

    def _abandoned(self, trial: FrozenTrial) -> bool:
        if trial.number in self._inherited:
            return True
        by = trial.user_attrs.get("by")
        if by is None:
            started = trial.datetime_start
            return started is not None and time.time() - started.timestamp() > _DOORWAY_SECONDS
        if by["place"] == _place() and not _lives(by["pid"]):
            return True
        return bool(time.time() - by["since"] > _CLAIM_SECONDS)

    def _give_back(self, trial: FrozenTrial) -> None:
        self._inherited.discard(trial.number)
        if self._tell(trial.number, "FAIL") and "config" in trial.user_attrs:
            self._enqueue(Config.from_json(trial.user_attrs["config"]))

    def _enqueue(self, config: Config) -> None:
        # The attribute is there when the trial is: who sees it need not wait.
        params = dict(self.space.to_params(config))
        self.study.enqueue_trial(params, user_attrs={"config": config.to_json()})

    def _tell(self, trial: Trial | int, state: str) -> bool:
        """End a trial without a value; whether it was not ended already."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        number = trial if isinstance(trial, int) else trial.number
        self._mine.discard(number)
        with suppress(UpdateFinishedTrialError, ValueError):
            self.study.tell(trial, state=TrialState[state])
            return True
        return False

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _signature(self) -> dict[str, Any]:
        return {
            "place": _place(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.time(),
        }


def _text(trial: FrozenTrial) -> str | None:
    config = trial.user_attrs.get("config")
    return None if config is None else str(Config.from_json(config))


def _running(trial: FrozenTrial) -> bool:
    return trial.state.name == "RUNNING"


def _tries(trial: FrozenTrial) -> bool:
    return _running(trial) and "task" not in trial.user_attrs


def _waiting(trial: FrozenTrial) -> bool:
    return trial.state.name == "WAITING"


def _failed(trial: FrozenTrial) -> bool:
    return trial.state.name == "FAIL"


def _place() -> str:
    """Where process ids mean what they mean here: a boot of a machine, and a PID namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "/".join(parts)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

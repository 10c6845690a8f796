"""Noise of a GPU, recorded: pairs of the same code, in many sessions; and runs resampled from it.

A noise file is JSON lines. The first is the header, with the GPU seconds that a pair takes by
series, and (both may be left out) those before the first pair of a session, and own thresholds:

    {"device": "…", "versions": {"torch": "…"}, "clocks": "…", "round_seconds": {"gemm": 0.02},
     "start_seconds": 3.0, "thresholds": {"host loop": 0.05}}

Each other line is a series in a session, a process of its own, old and new measured interleaved:

    {"series": "gemm", "session": 0, "old": [0.0011, …], "new": [0.0011, …]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.autotune.rule import Rule
from tilewright.errors import UsageError

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

BLOCK = 5  # pairs of the moving-block bootstrap


@dataclass(frozen=True)
class Noise:
    """Recorded pairs of the same code.

    Attributes:
        header: of the file.
        series: names.
        old, new: seconds, [sessions, series, pairs].
    """

    header: Mapping[str, Any]
    series: tuple[str, ...]
    old: Floats
    new: Floats

    @property
    def thresholds(self) -> Floats:
        """By series; the rule's default where the header names none."""
        own = self.header.get("thresholds", {})
        return np.array([own.get(name, Rule().threshold) for name in self.series])

    @property
    def round_seconds(self) -> Floats:
        """GPU seconds of one pair, by series."""
        return np.array([float(self.header["round_seconds"][name]) for name in self.series])


def read_noise(path: Path) -> Noise:
    """The recorded noise; sessions are cut to the shortest.

    Raises:
        UsageError: no file, a broken line, a series that not every session has, one session only.
    """
    if not path.exists():
        found, remedy = "none", "Record it on a GPU with benchmarks/gpu/record_noise.py."
        raise UsageError(f"noise {path}", expected="a file", found=found, remedy=remedy)
    pairs: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
    header: dict[str, Any] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            data = json.loads(line)
            if number == 1:
                header = dict(data)
                continue
            old, new = [float(x) for x in data["old"]], [float(x) for x in data["new"]]
            if len(old) != len(new) or not all(0 < x < math.inf for x in old + new):
                raise ValueError("old and new are not pairs of positive seconds")
            pairs[int(data["session"]), str(data["series"])] = old, new
        except (ValueError, KeyError, TypeError) as error:
            raise _broken(f"{path}, line {number}", repr(error)) from error
    return _noise(path, header, pairs)


def _noise(
    path: Path,
    header: dict[str, Any],
    pairs: dict[tuple[int, str], tuple[list[float], list[float]]],
) -> Noise:
    sessions = sorted({session for session, _ in pairs})
    series = tuple(dict.fromkeys(name for _, name in pairs))
    if len(sessions) < 2:
        raise _broken(str(path), f"{len(sessions)} sessions, two are the least")
    for name in series:
        if name not in header.get("round_seconds", {}):
            raise _broken(str(path), f"no round_seconds of {name}")
        for session in sessions:
            if (session, name) not in pairs:
                raise _broken(str(path), f"no {name} in session {session}")
    length = min(len(old) for old, _ in pairs.values())
    if length < BLOCK:
        raise _broken(str(path), f"{length} pairs in a session, {BLOCK} are the least")
    old, new = (
        np.array([[pairs[s, name][side][:length] for name in series] for s in sessions])
        for side in (0, 1)
    )
    return Noise(header, series, old, new)


def _broken(culprit: str, found: str) -> UsageError:
    remedy = "Record it anew with benchmarks/gpu/record_noise.py."
    return UsageError(culprit, expected="recorded noise", found=found, remedy=remedy)


def synthetic_noise(
    seed: int = 0, sessions: int = 20, series: int = 30, pairs: int = 100, bias: float = 0.002
) -> Noise:
    """Noise like a GPU's: heavy tails, clocks that drift, and a bias of each session's allocation.

    Args:
        seed: of all of it.
        sessions, series, pairs: how much.
        bias: standard deviation of the log ratio between two loads of the same code.
    """
    rng = np.random.default_rng(seed)
    shape = (sessions, series, pairs)
    clock = np.cumsum(rng.normal(0, 0.001, (sessions, 1, pairs)), axis=2)  # common to a session
    clock = clock + rng.normal(0, 0.003, (sessions, 1, 1))
    level = np.log(np.geomspace(1e-5, 1e-3, series))[:, None] + clock
    scale = rng.uniform(0.002, 0.008, (series, 1))
    old, new = (level + scale * rng.standard_t(3, shape) for _ in range(2))
    new = new + rng.normal(0, bias, (sessions, series, 1))
    new = new + 0.1 * (rng.random(shape) < 0.005)  # something else ran meanwhile
    names = tuple(f"kernel {i}" for i in range(series))
    header = {"device": "synthetic", "round_seconds": dict.fromkeys(names, 0.02)}
    return Noise(header, names, np.exp(old), np.exp(new))


@dataclass(frozen=True)
class Suites:
    """Resampled runs: of each its session, and which of the session's pairs come in which order.

    Attributes:
        noise: what is resampled.
        session: [runs].
        order: [runs, rounds].
    """

    noise: Noise
    session: Ints
    order: Ints

    @classmethod
    def draw(
        cls,
        noise: Noise,
        runs: int,
        rounds: int,
        rng: np.random.Generator,
        other_than: Ints | None = None,
    ) -> Suites:
        """So many runs; with `other_than` each of another session than that one, [runs]."""
        sessions, _, pairs = noise.old.shape
        session = rng.integers(0, sessions, runs)
        if other_than is not None:
            session = (other_than + rng.integers(1, sessions, runs)) % sessions
        starts = rng.integers(0, pairs - BLOCK + 1, (runs, math.ceil(rounds / BLOCK)))
        order = (starts[:, :, None] + np.arange(BLOCK)).reshape(runs, -1)[:, :rounds]
        return cls(noise, session, order)

    def times(self, run: Ints, series: Ints, rounds: int) -> tuple[Floats, Floats]:
        """Old and new of the first rounds, each [k, rounds], of k (run, series)."""
        at = self.session[run][:, None], series[:, None], self.order[run, :rounds]
        return self.noise.old[at], self.noise.new[at]

    def log_ratios(self, run: Ints, series: Ints, rounds: int) -> Floats:
        """Logarithms of new over old, [k, rounds]."""
        old, new = self.times(run, series, rounds)
        return np.log(new / old)


@dataclass(frozen=True)
class SeriesNoise:
    """What the noise of one series is like; all are standard deviations of logarithms.

    Attributes:
        series: its name.
        pairs: of new over old within a session, robust: from the median absolute deviation.
        sessions: of the sessions' median of new over old. It must stay well below t / 2.
        worst: the largest of those medians, by amount: the bias of a load.
        levels: of the sessions' median old time: what comparing with stored times would suffer.
        lag: correlation of neighbouring pairs.
    """

    series: str
    pairs: float
    sessions: float
    worst: float
    levels: float
    lag: float


def describe(noise: Noise) -> list[SeriesNoise]:
    """What the recorded noise is like, by series."""
    logs = np.log(noise.new / noise.old)
    medians = np.median(logs, axis=2)
    off = logs - medians[:, :, None]
    spread = 1.4826 * np.median(np.abs(off), axis=(0, 2))
    levels = np.log(np.median(noise.old, axis=2)).std(axis=0, ddof=1)
    lag = (off[:, :, 1:] * off[:, :, :-1]).mean(axis=(0, 2)) / np.maximum(
        (off**2).mean(axis=(0, 2)), 1e-300
    )
    columns = (spread, medians.std(axis=0, ddof=1), np.abs(medians).max(axis=0), levels, lag)
    return [
        SeriesNoise(name, *(float(column[i]) for column in columns))
        for i, name in enumerate(noise.series)
    ]

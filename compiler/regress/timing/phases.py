"""Whole requests to two engines, each run by its own code, in turns: TTFT, ITL, throughput.

What the host does between kernels counts here, so the old engine runs the old code.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .package import Package

PROMPT, BATCH_PROMPT, BATCH, NEW_TOKENS = 512, 32, 32, 16
REQUESTS, THROUGHPUT_TOKENS = 48, 12
TURNS = {"ttft": 6, "itl": 3, "throughput": 2}
"""Turns of each side behind one pair, by the first word of the phase."""


class Phases:
    """The phases of one engine's work, each measured by a call.

    Args:
        package: the code that runs it.
        path: its folder.
    """

    def __init__(self, package: Package, path: str) -> None:
        self.engine = package.module("runtime.engine").load(path)
        self.params = package.module("runtime.params").SamplingParams
        lm = self.engine.image.lm
        self.vocab = lm.vocab_size
        self.batch = min(BATCH, lm.max_batch_size)
        self.generator = torch.Generator().manual_seed(0)
        self.prompt = self._ids(min(PROMPT, lm.max_model_len - NEW_TOKENS))
        self.batch_prompts = [self._ids(BATCH_PROMPT) for _ in range(self.batch)]
        lengths = torch.randint(16, 96, (REQUESTS,), generator=self.generator).tolist()
        self.requests = [self._ids(length) for length in lengths]
        self.table: Mapping[str, Callable[[], float]] = {
            "ttft": self.ttft,
            "itl b1": lambda: self.itl([self.prompt]),
            f"itl b{self.batch}": lambda: self.itl(self.batch_prompts),
            "throughput": self.throughput,
        }

    def ttft(self) -> float:
        """Seconds to the first token of a prompt."""
        seconds: float = self._run([self.prompt], 1)[0].timings.ttft
        return seconds

    def itl(self, prompts: Sequence[list[int]]) -> float:
        """Seconds between tokens, the median over the steps of all prompts."""
        done = self._run(prompts, NEW_TOKENS)
        steps: list[float] = [seconds for one in done for seconds in one.timings.itl[1:]]
        return statistics.median(steps)

    def throughput(self) -> float:
        """Tokens a second of more requests than fit at once."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        done = self._run(self.requests, THROUGHPUT_TOKENS)
        return sum(len(one.token_ids) for one in done) / (time.perf_counter() - started)

    def _ids(self, count: int) -> list[int]:
        return torch.randint(self.vocab, (count,), generator=self.generator).tolist()

    def _run(self, prompts: Sequence[list[int]], new_tokens: int) -> Sequence[Any]:
        params = self.params(max_new_tokens=new_tokens, ignore_eos=True)
        done: Sequence[Any] = self.engine.generate(list(prompts), params)
        return done


class PhasePairs:
    """Two engines that take turns.

    Attributes:
        names: the phases that both have.
    """

    def __init__(self, old: Phases, new: Phases) -> None:
        self.sides = (old, new)
        self.names = [name for name in new.table if name in old.table]
        for name in self.names:  # graphs are captured, libraries set up
            for side in self.sides:
                side.table[name]()

    def measure(
        self, names: Sequence[str], generator: random.Random
    ) -> Mapping[str, tuple[float, float]]:
        """One pair of each phase named: the best of a few turns, drawn by lot who is first. What
        others do to the host only ever takes time.
        """
        return {name: self._pair(name, generator) for name in names}

    def _pair(self, name: str, generator: random.Random) -> tuple[float, float]:
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(TURNS[name.split(" ")[0]]):
            for side in generator.sample((0, 1), 2):
                taken[side].append(self.sides[side].table[name]())
        best = max if name == "throughput" else min
        return best(taken[0]), best(taken[1])

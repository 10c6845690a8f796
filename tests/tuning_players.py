"""A pool for tests whose worker times configs by the prior: no process, no device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tilewright.autotune.pool import Pool
from tilewright.autotune.space import Config
from tilewright.autotune.tunable import RunnerSpec
from tilewright.codegen.triton.tuning.tunable import KernelTunable


class Steady:
    """Answers for several problems; a config takes the seconds that the prior gives it."""

    def __init__(self, problems: Sequence[KernelTunable]) -> None:
        self.known = {str(one.runner): one for one in problems}
        self.opened: KernelTunable | None = None

    @classmethod
    def pool(cls, problems: Sequence[KernelTunable]) -> Pool:
        return Pool(start=lambda: cls(problems))

    def open(self, spec: RunnerSpec) -> None:
        self.opened = self.known[str(spec)]

    def load(self, config: Config) -> None:
        pass

    def check(self, config: Config) -> float:
        return 0.0

    def time(self, config: Config, rounds: int) -> tuple[float, ...]:
        assert self.opened is not None
        return (self.opened.prior(config),) * rounds

    def facts(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        pass

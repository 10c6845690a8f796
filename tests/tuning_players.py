"""A pool for tests whose worker times configs by the prior: no process, no device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linear_forms import Form, node_of
from tilewright.autotune.pool import Pool
from tilewright.autotune.space import Config
from tilewright.autotune.tunable import RunnerSpec
from tilewright.codegen.triton.tuning.registry import template_named
from tilewright.codegen.triton.tuning.tunable import KernelTunable
from tilewright.ir.dtypes import DType
from tilewright.targets import TARGETS


def gemm_problems(count: int = 3) -> list[KernelTunable]:
    """One product at the first ``count`` buckets of tokens, for an H100."""
    node = node_of(Form(k=1024, n=512, behind=("residual",), dtype=DType.BF16))
    gemm = template_named("linear_gemm")
    sizes = (16, 32, 64, 128)[:count]
    return [KernelTunable.of(gemm, node, {"B": size}, TARGETS["h100"]) for size in sizes]


class Clock:
    """Stands for the module ``time``; only whoever measures turns it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Steady:
    """Answers for several problems; a config takes the seconds that the prior gives it.

    Args:
        problems: those it knows.
        clock: turned by a second with each round.
        interrupt: Ctrl-C when this problem's config is timed, by the problem's name.
    """

    def __init__(
        self,
        problems: Sequence[KernelTunable],
        clock: Clock | None = None,
        interrupt: tuple[str, Config] | None = None,
    ) -> None:
        self.known = {str(one.runner): one for one in problems}
        self.opened: KernelTunable | None = None
        self.clock, self.interrupt = clock, interrupt

    @classmethod
    def pool(cls, problems: Sequence[KernelTunable], **options: Any) -> Pool:
        return Pool(start=lambda: cls(problems, **options))

    def open(self, spec: RunnerSpec) -> None:
        self.opened = self.known[str(spec)]

    def load(self, config: Config) -> None:
        pass

    def check(self, config: Config) -> float:
        return 0.0

    def time(self, config: Config, rounds: int) -> tuple[float, ...]:
        assert self.opened is not None
        if (self.opened.name, config) == self.interrupt:
            raise KeyboardInterrupt
        if self.clock is not None:
            self.clock.sleep(rounds)
        return (self.opened.prior(config),) * rounds

    def facts(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        pass

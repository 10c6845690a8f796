"""What can be tuned, as the tuner sees it: a space with a default, and someone who can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import UsageError
from .key import Key
from .space import Config, Space


@dataclass(frozen=True, slots=True)
class Ready:
    """A config that was compiled ahead of time and can be launched.

    Attributes:
        digest: of everything that decides how it runs: the binary, and how it is launched. Configs
            of one digest are one candidate, and are measured once.
    """

    digest: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A config that is not worth running, and why: it spills, it asks for too much shared memory.

    Attributes:
        reason: in words, with the figures.
    """

    reason: str


Prepared = Ready | Refused


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """How a worker process builds its runner.

    Attributes:
        function: "module:function", importable in a fresh Python with our `sys.path`. It is called
            with `spec`, and returns a `Runner`.
        spec: what JSON can hold.

    Raises:
        UsageError: a function without a colon.
    """

    function: str
    spec: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(self.function.partition(":")):
            raise UsageError(
                "runner",
                expected='"module:function"',
                found=repr(self.function),
                remedy="Name a function that can be imported.",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data that `json` writes."""
        return {"function": self.function, "spec": dict(self.spec)}


class Runner(Protocol):
    """Runs configs, inside a worker process; it may hang, crash or raise.

    Raises:
        Exception: whatever is wrong with a config. One that tells of memory (`MemoryError`, a class
            named OutOfMemory..., "out of memory" in the text) marks it as out of memory.
    """

    def prepare(self, config: Config) -> None:
        """Load the binary of a config. It may be asked for several configs, and keeps them all."""

    def check(self, config: Config) -> float:
        """Run it once on fresh inputs; the largest error as a multiple of the tolerance, 1 is good.

        The outputs are overwritten with something wrong first: a kernel that writes nothing must
        not pass on what the one before it left there. NaN is an error without limit.
        """

    def time(self, config: Config, rounds: int) -> Sequence[float]:
        """Seconds of one call, `rounds` times, with cold caches and after a warm-up of its own.

        All that was launched has ended when it returns, so that a fault is this config's.
        """

    def facts(self) -> Mapping[str, Any]:
        """What else is worth keeping, as JSON: the device, its clocks, its temperature."""


class Tunable(Protocol):
    """A kernel and a problem, whose configs are to be compared."""

    @property
    def key(self) -> Key:
        """What the choice depends on."""
        ...

    @property
    def space(self) -> Space:
        """Of its configs."""
        ...

    @property
    def default(self) -> Config:
        """A config that always works."""
        ...

    @property
    def pinned(self) -> Sequence[Config]:
        """Configs of the space that are always tried, whatever the prior says of them. They depend
        on the key alone.
        """
        ...

    @property
    def name(self) -> str:
        """For people, and for the names of studies."""
        ...

    @property
    def runner(self) -> RunnerSpec:
        """Who runs the configs, built inside a worker."""
        ...

    def prior(self, config: Config) -> float:
        """Seconds that a model expects, before anything ran; the same in every process."""
        ...

    def numerics(self, config: Config) -> str:
        """The class of configs that sum in the same order, and so agree in every bit."""
        ...

    def prepare(self, configs: Sequence[Config]) -> Mapping[Config, Prepared]:
        """Compile ahead of time, in parallel, without touching the device.

        A config that is missing from the answer counts as refused.
        """
        ...

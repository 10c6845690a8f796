"""A call and a template, as the tuner sees them (autotune/tunable.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from ....autotune.key import Key
from ....autotune.space import Config, Space
from ....autotune.tunable import Prepared, Ready, Refused, RunnerSpec
from ....errors import TilewrightError
from ....ir.graph import Graph
from ....ir.node import Node
from ....targets import Target
from ...program import Program
from ..aot import compile_sources
from ..package import KernelPackage
from ..source import KernelSource
from .problem import call_of, problem_graph
from .template import Sizes, Template

_RUNNER = "tilewright.codegen.triton.tuning.runner:build"


@dataclass(frozen=True)
class KernelTunable:
    """One problem of a template on a target.

    Attributes:
        template: what makes kernels of configs.
        graph: of the call alone (`problem_graph`).
        sizes: the symbols' values that it is measured at.
        target: the device.
    """

    template: Template
    graph: Graph
    sizes: Sizes
    target: Target

    @classmethod
    def of(cls, template: Template, node: Node, sizes: Sizes, target: Target) -> KernelTunable:
        """The tunable of a call that the template takes."""
        return cls(template, problem_graph(node), dict(sizes), target)

    @property
    def node(self) -> Node:
        """The call."""
        return call_of(self.graph)

    @property
    def name(self) -> str:
        """The template and the problem, for people."""
        facts = [f"{name}={value}" for name, value in self.key.problem if value not in ("", 0)]
        return f"{self.template.name} {' '.join(facts)}"

    @cached_property
    def space(self) -> Space:
        """The configs that could run on the target."""
        return self.template.space(self.node, self.sizes, self.target)

    @cached_property
    def default(self) -> Config:
        """What is taken without tuning."""
        return self.template.default(self.node, self.sizes, self.target)

    @property
    def pinned(self) -> Sequence[Config]:
        """What is always tried."""
        return self.template.pinned(self.node, self.sizes, self.target)

    @cached_property
    def key(self) -> Key:
        """What a choice depends on."""
        return Key(
            template=self.template.name,
            template_hash=self.template.code_hash,
            space_hash=self.space.digest,
            problem=self.template.facts(self.node, self.sizes),
            device=str(self.target),
            arch=self.target.arch,
        )

    @property
    def runner(self) -> RunnerSpec:
        """Who measures it, in a worker on the device."""
        spec = {
            "template": self.template.name,
            "graph": str(self.graph),
            "sizes": dict(self.sizes),
            "target": str(self.target),
        }
        return RunnerSpec(_RUNNER, spec)

    def prior(self, config: Config) -> float:
        """Seconds that the model expects."""
        return self.template.prior(self.node, config, self.sizes, self.target)

    def numerics(self, config: Config) -> str:
        """What decides the order of sums."""
        return self.template.numerics(config)

    def prepare(self, configs: Sequence[Config]) -> Mapping[Config, Prepared]:
        """Compiles them all at once, in parallel; what spills or cannot be launched is refused."""
        made = {config: self._made(config) for config in configs}
        sources = {config: each[1] for config, each in made.items() if each is not None}
        packages = _compiled(sources, self.target.arch)
        found: dict[Config, Prepared] = {}
        for config in configs:
            compiled, each = packages.get(config), made[config]
            if compiled is None or each is None:
                found[config] = Refused("there is no such kernel")
            elif isinstance(compiled, str):
                found[config] = Refused(compiled)
            else:
                found[config] = _judged(each[0], compiled, self.target)
        return found

    def _made(self, config: Config) -> tuple[Program | None, tuple[KernelSource, ...]] | None:
        """What computes a config: calls with their kernels, or one kernel; None for nothing."""
        calls = self.template.calls(self.node, config, self.target)
        if calls is not None:
            return calls
        source = self.template.source(self.node, config, self.sizes, self.target)
        return None if source is None else (None, (source,))


def _compiled(
    sources: Mapping[Config, Sequence[KernelSource]], arch: int
) -> Mapping[Config, list[KernelPackage] | str]:
    """The packages; in words why there are none for sources that do not compile."""
    try:
        every = compile_sources([one for some in sources.values() for one in some], arch)
        rest = iter(every)
        return {config: list(islice(rest, len(some))) for config, some in sources.items()}
    except TilewrightError:  # the others are in the cache by now
        pass
    found: dict[Config, list[KernelPackage] | str] = {}
    for config, some in sources.items():
        try:
            found[config] = compile_sources(list(some), arch)
        except TilewrightError as error:
            found[config] = str(error)
    return found


def _judged(program: Program | None, packages: Sequence[KernelPackage], target: Target) -> Prepared:
    """Generated kernels around a library's call may spill: no config of theirs would not."""
    digest = hashlib.sha256()
    if program is not None:
        digest.update(json.dumps(program.to_json()).encode())
    for package in packages:
        refused = _why_not(package, target, may_spill=program is not None)
        if refused is not None:
            return Refused(refused)
        digest.update(repr(package.source.variants).encode())
        for key in sorted(package.binaries):
            digest.update(package.binaries[key].cubin)
    return Ready(digest.hexdigest())


def _why_not(package: KernelPackage, target: Target, may_spill: bool) -> str | None:
    for binary in package.binaries.values():
        takes = binary.resources
        if takes.spills and not may_spill:
            return f"{binary.function} spills {takes.spills} bytes of registers"
        if takes.shared > target.shared_memory_per_block:
            most = target.shared_memory_per_block
            return f"{binary.function} needs {takes.shared} bytes of {most} shared"
        if takes.registers * takes.threads > target.registers_per_sm:
            return f"{binary.function} needs more registers than a multiprocessor has"
    return None

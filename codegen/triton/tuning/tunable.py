"""A call and a template, as the tuner sees them (autotune/tunable.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ....autotune.key import Key
from ....autotune.prior import predict
from ....autotune.space import Config, Space
from ....autotune.tunable import Prepared, Ready, Refused, RunnerSpec
from ....errors import TilewrightError
from ....ir.graph import Graph
from ....ir.node import Node
from ....targets import Target
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
        work = self.template.work(self.node, config, self.sizes, self.target)
        return predict(work, self.target, self.template.constants)

    def numerics(self, config: Config) -> str:
        """What decides the order of sums."""
        return self.template.numerics(config)

    def prepare(self, configs: Sequence[Config]) -> Mapping[Config, Prepared]:
        """Compiles them all at once, in parallel; what spills or cannot be launched is refused."""
        sources = {config: self._source(config) for config in configs}
        wanted = {config: source for config, source in sources.items() if source is not None}
        packages = _compiled(wanted, self.target.arch)
        found: dict[Config, Prepared] = {}
        for config in configs:
            package = packages.get(config)
            if package is None:
                found[config] = Refused("there is no such kernel")
            elif isinstance(package, str):
                found[config] = Refused(package)
            else:
                found[config] = _judged(package, self.target)
        return found

    def _source(self, config: Config) -> KernelSource | None:
        return self.template.source(self.node, config, self.sizes, self.target)


def _compiled(
    sources: Mapping[Config, KernelSource], arch: int
) -> Mapping[Config, KernelPackage | str]:
    """The packages; in words why there is none for a source that does not compile."""
    try:
        packages = compile_sources(list(sources.values()), arch)
        return dict(zip(sources, packages, strict=True))
    except TilewrightError:  # the others are in the cache by now
        pass
    found: dict[Config, KernelPackage | str] = {}
    for config, source in sources.items():
        try:
            (found[config],) = compile_sources([source], arch)
        except TilewrightError as error:
            found[config] = str(error)
    return found


def _judged(package: KernelPackage, target: Target) -> Prepared:
    for binary in package.binaries.values():
        takes = binary.resources
        if takes.spills:
            return Refused(f"{binary.function} spills {takes.spills} bytes of registers")
        if takes.shared > target.shared_memory_per_block:
            most = target.shared_memory_per_block
            return Refused(f"{binary.function} needs {takes.shared} bytes of {most} shared")
        if takes.registers * takes.threads > target.registers_per_sm:
            return Refused(f"{binary.function} needs more registers than a multiprocessor has")
    digest = hashlib.sha256(repr(package.source.variants).encode())
    for key in sorted(package.binaries):
        digest.update(package.binaries[key].cubin)
    return Ready(digest.hexdigest())

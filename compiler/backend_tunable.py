"""The backends of a whole model, as the tuner sees them (autotune/tunable.py): one choice.

A candidate is an engine. It is compiled ahead of time into a folder of its own, as `save` writes
it; what a backend does not take, or what is not installed, is refused with the reason.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from ..autotune.ast_hash import normalised_ast_hash
from ..autotune.key import Key, Problem
from ..autotune.space import Choice, Config, Space
from ..autotune.tunable import Prepared, Ready, Refused, RunnerSpec
from ..codegen.base import backend_names, get_backend
from ..errors import UsageError
from ..formats.weights import weight_leaves
from ..ir.dtypes import DType
from ..ir.graph import Graph, param_name
from ..passes.expressions import expressions
from ..runtime.folder import save_engine
from ..runtime.image import EngineImage
from ..settings import current
from ..targets import Target, available_cores, cpu_isa_flags
from ..targets.detect import cpu_name
from . import backend_runner
from .backend_runner import Work
from .options import CompileOptions
from .quantizing import stored_type

TEMPLATE = "backend"
REFERENCE = "eager"
"""The backend that computes each op as it is defined: others are held against it, in float32."""

_NO_REFERENCE = "there is nothing to hold it against"
_RUNNER = f"{backend_runner.__name__}:build"
SPACE = Space((Choice(TEMPLATE, backend_names()),))

Make = Callable[[CompileOptions], EngineImage]


def config_of(backend: str) -> Config:
    """The config that stands for a backend."""
    return Config.of({TEMPLATE: backend}, SPACE.names)


def backend_of(config: Config) -> str:
    """The backend that a config stands for."""
    return str(config[TEMPLATE])


@dataclass(frozen=True, slots=True)
class Rivals:
    """The backends that a causal LM can have on a device.

    Attributes:
        model: its name, for people.
        key: what the choice between them depends on.
        options: of the compile, by backend; the first is taken without measuring.
        refused: why others of the registry cannot be taken.
        work: that is measured.
        make: compiles the model.
        exact: whether all its numbers are float32, so that the reference is one of the candidates.
    """

    model: str
    key: Key
    options: Mapping[str, CompileOptions]
    refused: Mapping[str, str]
    work: Work
    make: Make
    exact: bool

    @classmethod
    def of(cls, graph: Graph, options: CompileOptions, limit: int, make: Make) -> Rivals:
        """The rivals of a model.

        Args:
            graph: captured, before passes.
            options: of the compile, for the backend that is taken without measuring.
            limit: longest sequence.
            make: compiles the model.
        """
        work = Work.of(limit, options.max_batch_size)
        able = {options.backend: replace(options, rivals=())}
        able |= {one.backend: one.options for one in options.rivals if one.options is not None}
        refused = {one.backend: one.refused for one in options.rivals if one.options is None}
        floats = {x.dtype for x in (*graph.params, *graph.outputs) if x.dtype.is_float}
        key = key_of(graph, options, limit, work)
        return cls(graph.name, key, able, refused, work, make, floats == {DType.F32})

    @property
    def default(self) -> Config:
        """What is taken without measuring."""
        return config_of(next(iter(self.options)))

    @property
    def target(self) -> Target:
        """The device."""
        return next(iter(self.options.values())).target

    @property
    def has_kernels(self) -> bool:
        """Whether the default's kernels are ours, and have configs to tune."""
        return get_backend(backend_of(self.default)).own_kernels


@dataclass(frozen=True)
class BackendTunable:
    """The choice of a model's backend on the device at hand.

    Attributes:
        rivals: what there is to choose from.
        folder: where the engines of candidates are kept; whoever made it takes it away.
        images: what was compiled, by backend.
        prepared: what came of it: nothing is compiled twice.
    """

    rivals: Rivals
    folder: Path
    images: dict[str, EngineImage] = field(default_factory=dict)
    prepared: dict[Config, Prepared] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What the choice depends on."""
        return self.rivals.key

    @property
    def name(self) -> str:
        """For people, and for the name of the study."""
        return f"{TEMPLATE} of {self.rivals.model}"

    @property
    def space(self) -> Space:
        """Every backend that there is, so that a new one is another space."""
        return SPACE

    @property
    def default(self) -> Config:
        """What is taken without tuning."""
        return self.rivals.default

    @property
    def pinned(self) -> Sequence[Config]:
        """All of them: they are few."""
        return tuple(SPACE.configs())

    @property
    def runner(self) -> RunnerSpec:
        """Who loads and measures the engines, in a worker."""
        spec = {
            "folder": str(self.folder),
            "candidates": len(self.rivals.options),
            "reference": self._reference_name,
            "work": self.rivals.work.to_json(),
        }
        return RunnerSpec(_RUNNER, spec)

    def prior(self, config: Config) -> float:
        """The same seconds for all: nothing is known before."""
        return 1.0

    def numerics(self, config: Config) -> str:
        """Each backend sums in an order of its own."""
        return backend_of(config)

    def prepare(self, configs: Sequence[Config]) -> Mapping[Config, Prepared]:
        """Compiles each, and the reference, into the folder."""
        missing = [config for config in configs if config not in self.prepared]
        if missing and (reason := self._reference()):
            self.prepared.update((config, Refused(reason)) for config in missing)
        for config in missing:
            if config not in self.prepared:
                self.prepared[config] = self._compiled(backend_of(config))
        return {config: self.prepared[config] for config in configs}

    def _compiled(self, backend: str) -> Prepared:
        rivals = self.rivals
        if backend not in rivals.options:
            return Refused(rivals.refused.get(backend, "there is no such backend here"))
        try:
            image = rivals.make(rivals.options[backend])
            if image.lm is None:
                return Refused("what it compiles does not generate")
            _save(image, self.folder / backend)
        except Exception as error:  # of libraries too: whatever it is, the candidate is out
            return Refused(f"{type(error).__name__}: {error}")
        self.images[backend] = image
        return Ready(_digest(image))

    @property
    def _reference_name(self) -> str:
        """Of its folder."""
        return REFERENCE if self.rivals.exact else f"{REFERENCE}-float32"

    def _reference(self) -> str:
        """Makes sure of the reference's engine; in words why there is none."""
        if (self.folder / self._reference_name).exists():
            return ""
        if self.rivals.exact:
            found = self.prepared[config_of(REFERENCE)] = self._compiled(REFERENCE)
            return f"{_NO_REFERENCE}: {found.reason}" if isinstance(found, Refused) else ""
        own = self.rivals.options.get(REFERENCE)
        if own is None:
            why = self.rivals.refused.get(REFERENCE, "there is no such backend here")
            return f"{_NO_REFERENCE}: {why}"
        try:
            try:
                image = self.rivals.make(replace(own, dtype=torch.float32, tune="none"))
            except UsageError:  # a module in memory, whose numbers stay as they are
                image = self.rivals.make(replace(own, tune="none"))
            _save(image, self.folder / self._reference_name)
        except Exception as error:
            return f"{_NO_REFERENCE}: {type(error).__name__}: {error}"
        return ""


def _save(image: EngineImage, folder: Path) -> None:
    """Writes an engine; its weights stay in the checkpoint where there is one."""
    try:
        save_engine(image, folder, "reference")
    except UsageError:
        save_engine(image, folder, "embed")


def _digest(image: EngineImage) -> str:
    """Of what runs: the Programs and their files."""
    digest = hashlib.sha256(json.dumps(image.program.to_json()).encode())
    if image.decode is not None:
        digest.update(json.dumps(image.decode.program.to_json()).encode())
    for name, content in sorted(image.files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def key_of(graph: Graph, options: CompileOptions, limit: int, work: Work) -> Key:
    """What the choice of a backend depends on.

    Args:
        graph: captured, before passes: the same for all backends.
        options: of the compile, for the backend that is taken without measuring.
        limit: longest sequence.
        work: that is measured.
    """
    device = options.target
    here = device.is_cpu
    problem: Problem = (
        ("graph", graph_digest(graph)),
        ("dtype", str(graph.outputs[0].dtype)),
        ("weights", _stored(graph)),
        ("quantize", "none" if options.quantize is None else repr(options.quantize)),
        ("stored", options.stored or "as they are"),
        ("heads", "as they are" if options.heads is None else repr(options.heads)),
        ("max_batch_size", options.max_batch_size),
        ("max_model_len", limit),
        ("kv_cache", _cache(options)),
        ("work", str(work)),
        *((("decode", options.decode),) if options.decode != "auto" else ()),
        # Of a GPU the host's part is the same work on any of them.
        ("processor", f"{cpu_name()} {' '.join(cpu_isa_flags())}" if here else ""),
        ("cores", (current().threads or available_cores()) if here else 0),
    )
    return Key(
        template=TEMPLATE,
        template_hash=_runner_hash(),
        space_hash=SPACE.digest,
        problem=problem,
        device=device.name if here else str(device),
        arch=device.arch,
    )


@cache
def _runner_hash() -> str:
    """Of the code that says what is timed, and how."""
    return normalised_ast_hash(inspect.getsource(backend_runner))


def graph_digest(graph: Graph) -> str:
    """SHA-256 of a graph's structure, in hex, whatever it is called."""
    return hashlib.sha256(str(replace(graph, name="model")).encode()).hexdigest()


def _stored(graph: Graph) -> str:
    """How many tensors of which type the checkpoint holds: backends read codes, or expand them."""
    counts = Counter(
        stored_type(leaf) or str(leaf.dtype).removeprefix("torch.")
        for weight in expressions(graph, map(param_name, graph.params)).values()
        for leaf in weight_leaves(weight)
    )
    return " ".join(f"{kind}:{count}" for kind, count in sorted(counts.items()))


def _cache(options: CompileOptions) -> str:
    """The form of the cache as it was asked for: what "auto" gives follows from the backend."""
    kept = f"{options.asked_cache}, pages of {options.page_size}"
    codes = "" if options.codes is None else f", {options.codes}"
    window = "" if options.window is None else f", {options.window}"
    cached = "" if options.prefix_caching else ", no prefixes"
    return f"{kept}{codes}{window}{cached}"

"""A decode step as the tuner sees it (autotune/tunable.py): one launch, or separate kernels.

Both Programs are compiled ahead of time into a folder, which a worker process reads
(decode_runner.py). What the one launch does not know, or Triton does not compile, is refused with
the reason, as what computes something else or is given up is by whoever measures.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ..autotune.config import Config
from ..autotune.effort import Effort
from ..autotune.key import Key
from ..autotune.pool import Pool
from ..autotune.search import Progress
from ..autotune.space import Space
from ..autotune.store import Store, unwritable
from ..autotune.tunable import Prepared, Ready, Refused, RunnerSpec, Tunable
from ..autotune.worker import Limits, WorkerError
from ..codegen.base import Lowered, get_backend
from ..codegen.persistent.lowering import with_one_launch
from ..errors import UnsupportedError
from ..ir.graph import Graph
from ..ir.parser import parse_graph
from ..runtime.image import EngineImage
from ..settings import current
from ..targets import Target
from . import decode_runner
from .decode_choice import LEAST_GAIN, SPACE, TEMPLATE, StepProblem, config_of, step_problems
from .decode_runner import KERNELS, ONE_LAUNCH, WAY
from .tuning import TunedProblem, tune_all, unmeasured

LIMITS = Limits(start=300.0, load=120.0, check=120.0, time=60.0)
"""Of a worker: weights are drawn, of a whole model."""
_RUNNER = f"{decode_runner.__name__}:build"


@dataclass(frozen=True)
class StepKernels:
    """The Program of separate kernels, lowered when it is first asked for: by then the kernels are
    tuned.
    """

    graph: Graph
    target: Target
    max_sequences: int
    max_model_len: int
    store: Store | None

    @cached_property
    def lowered(self) -> Lowered:
        """The Program."""
        return get_backend("triton").lower(
            self.graph,
            self.target,
            self.max_model_len,
            max_sequences=self.max_sequences,
            tuning=self.store,
        )


@dataclass(frozen=True)
class DecodeTunable:
    """The choice of a decode step's way on the device at hand.

    Attributes:
        problem: the step.
        kernels: of separate kernels.
        folder: where both ways' files are kept; whoever made it takes it away.
        prepared: what came of compiling them: nothing is compiled twice.
    """

    problem: StepProblem
    kernels: StepKernels
    folder: Path
    prepared: dict[Config, Prepared] = field(default_factory=dict)

    @cached_property
    def key(self) -> Key:
        """What the choice depends on."""
        return self.problem.key

    @property
    def name(self) -> str:
        """For people, and for the name of the study."""
        return f"{TEMPLATE} of {self.problem.graph.name} sequences={self.problem.batch}"

    @property
    def space(self) -> Space:
        """Both ways."""
        return SPACE

    @property
    def default(self) -> Config:
        """Separate kernels."""
        return config_of(KERNELS)

    @property
    def pinned(self) -> Sequence[Config]:
        """Both."""
        return tuple(SPACE.configs())

    @property
    def runner(self) -> RunnerSpec:
        """Who runs both, in a worker on the device."""
        spec = {
            "folder": str(self.folder),
            "batch": self.problem.batch,
            "lengths": list(self.problem.lengths),
        }
        return RunnerSpec(_RUNNER, spec)

    def prior(self, config: Config) -> float:
        """The same seconds for both: nothing is known before."""
        return 1.0

    def numerics(self, config: Config) -> str:
        """Each sums in an order of its own."""
        return str(config[WAY])

    def prepare(self, configs: Sequence[Config]) -> Mapping[Config, Prepared]:
        """Compiles each into the folder."""
        for config in configs:
            if config not in self.prepared:
                self.prepared[config] = self._compiled(str(config[WAY]))
        return {config: self.prepared[config] for config in configs}

    def _compiled(self, way: str) -> Prepared:
        problem = self.problem
        try:
            lowered = self.kernels.lowered
            if way == ONE_LAUNCH:
                lowered = with_one_launch(lowered, problem.graph, problem.target, [problem.batch])
            return Ready(self._written(way, lowered))
        except UnsupportedError as error:
            return Refused(str(error))
        except Exception as error:  # of compilers too: whatever it is, the candidate is out
            return Refused(f"{type(error).__name__}: {error}")

    def _written(self, way: str, lowered: Lowered) -> str:
        """The digest of what was written into the folder."""
        program = json.dumps(lowered.program.to_json())
        digest = hashlib.sha256(program.encode())
        files = {f"{way}/{name}": content for name, content in lowered.files.items()}
        files |= {f"{way}.json": program.encode(), "graph.txt": str(self.problem.graph).encode()}
        for name, content in sorted(files.items()):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        return digest.hexdigest()


@contextmanager
def tunable_steps(
    graph: Graph, target: Target, max_sequences: int, max_model_len: int, store: Store | None
) -> Iterator[Sequence[DecodeTunable]]:
    """The steps of a decode graph whose way can be chosen, with a folder within TILEWRIGHT_CACHE
    that is gone when the block ends.

    Args:
        graph, target, max_sequences, max_model_len: as `step_problems` takes them.
        store: what is known of the separate kernels.

    Raises:
        UnsupportedError: there are none, as `step_problems` says.
        UsageError: the folder cannot be made.
    """
    problems = step_problems(graph, target, max_sequences, max_model_len)
    parent = current().cache
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="steps-", dir=parent)
    except OSError as error:
        raise unwritable(parent, error) from error
    kernels = StepKernels(graph, target, max_sequences, max_model_len, store)
    with folder as name:
        yield [DecodeTunable(one, kernels, Path(name) / str(one.batch)) for one in problems]


@contextmanager
def tunable_image(image: EngineImage, store: Store | None) -> Iterator[Sequence[DecodeTunable]]:
    """As `tunable_steps`, of an engine."""
    with tunable_steps(*_parts(image), store) as steps:
        yield steps


def image_problems(image: EngineImage) -> list[StepProblem]:
    """As `step_problems`, of an engine."""
    return step_problems(*_parts(image))


def _parts(image: EngineImage) -> tuple[Graph, Target, int, int]:
    """An engine's decode graph and target, and its limits."""
    decode, lm = image.decode, image.lm
    if image.backend != "triton" or decode is None or lm is None or not decode.graphs:
        raise UnsupportedError(
            f"one launch for all layers of {image.name}",
            expected="a causal LM with a decode Program of the Triton backend",
            found=f"backend {image.backend!r}" + ("" if decode else ", no decode Program"),
            remedy="Compile it with backend='triton', for a GPU, and without deterministic=True.",
        )
    graph, target = parse_graph(decode.graphs[-1][1]), Target.parse(image.target)
    return graph, target, lm.max_batch_size, lm.max_model_len


def tune_steps(
    steps: Sequence[DecodeTunable],
    effort: Effort,
    store: Store,
    *,
    again: bool = False,
    storage: str | Path | None = None,
    seed: int = 0,
    resume: bool = False,
    deadline: float | None = None,
    progress: Callable[[Tunable, Progress], None] = lambda tunable, progress: None,
    pool: Pool | None = None,
) -> Iterator[TunedProblem]:
    """Measures which way each step goes faster, and records it. A step that no worker can run, such
    as one whose weights do not fit beside what is on the device, keeps its separate kernels.

    Args:
        steps: what to choose for; their kernels have been tuned before.
        effort: of kernels.
        store: where records go.
        again: measure also what the store knows.
        storage, seed, resume: of the searches, as `tune_all` takes them.
        deadline: by `time.monotonic`.
        progress: called as a search goes on.
        pool: of workers; one of its own by default.

    Raises:
        StorageError: ``storage`` does not answer.
        UsageError: the store cannot be written; nothing is measured then.
    """
    stopped = False
    both = effort.trials if effort.trials >= SPACE.count() else 0  # one alone would say nothing
    spent = replace(effort, trials=both, share=1.0, leave=LEAST_GAIN)
    own = pool or Pool(LIMITS)
    try:
        for step in steps:
            left = 0.0 if stopped else None
            if deadline is not None and not stopped:
                left = max(0.0, deadline - time.monotonic())
            try:
                for one in tune_all(
                    [step],
                    spent,
                    store,
                    again=again,
                    storage=storage,
                    seed=seed,
                    resume=resume,
                    seconds=left,
                    progress=progress,
                    pool=own,
                ):
                    stopped |= one.tuned is not None and one.tuned.interrupted
                    yield one
            except WorkerError as error:
                yield unmeasured(step, str(error))
    finally:
        if pool is None:
            own.close()

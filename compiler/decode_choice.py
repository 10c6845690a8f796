"""Whether a decode step is one launch or the separate kernels: what was measured on this device.

The choice is made for each number of sequences that steps are padded to, 1 to 8. The way of the
data:

    problem     `step_problems`: a decode graph that the one launch knows (codegen/persistent), a
                number of sequences, two lengths of context
    key         the kernel's source (`template_hash`), the graph's calls, sizes, codes, sequences
                and lengths (`problem`), the device
    lookup      ``decode="auto"``: `choose_steps` asks the store (tune="none" does not). A record
                that says so, and a kernel that compiles: one launch. All else: separate kernels
    measuring   tune="quick", "full" or a TuneConfig, and `tilewright tune`: behind the kernels, as
                these are (decode_tunable.py, decode_runner.py); both ways, as captured graphs over
                the same weights, in turns. One launch has to be surely faster by `LEAST_GAIN`
    report      ``engine.report()["decode"]``: which steps go which way, and why

A record of another driver or version of ours is taken, with a note, until it is measured again: its
kernel is the very same text, which was held against the separate kernels'. Not so of another
Triton: what programs of one launch tell each other hangs on its compiler, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..autotune.config import Config
from ..autotune.key import TOKEN_BUCKETS, Key, Problem, token_bucket
from ..autotune.lookup import Found, lookup
from ..autotune.space import Choice, Space
from ..autotune.store import Store
from ..codegen.base import Lowered
from ..codegen.persistent.lowering import launch_digest, with_one_launch
from ..codegen.persistent.reading import Attention, Product, Shape, read_decode
from ..codegen.program import Json
from ..codegen.triton.tuning.conditions import conditions_here
from ..errors import UnsupportedError
from ..ir.graph import Graph
from ..targets import Target
from .decode_runner import KERNELS, ONE_LAUNCH, WAY

TEMPLATE = "decode_step"
SPACE = Space((Choice(WAY, (KERNELS, ONE_LAUNCH)),))
BATCHES = (1, 2, 4, 8)
SINCE = 90
"""The first architecture whose steps are looked up and measured."""
OTHER_TRITON = (ImportError, AttributeError)
"""What a Triton raises whose Gluon is not as the kernels need it."""
LEAST_GAIN = (0.01, 0.015)
"""The fraction by which one launch must surely be faster, at least and most (decide.py)."""
LENGTHS = (512, 4096)
"""Tokens of context that steps are timed at, those that the model takes: the mean counts."""


@dataclass(frozen=True, slots=True)
class StepProblem:
    """A decode step of a model, whose way is to be chosen.

    Attributes:
        graph: the decode graph, and ``shape`` what the one launch reads of it.
        target: the device.
        batch: sequences.
        lengths: of the context that steps are timed at, in tokens.
    """

    graph: Graph = field(repr=False)
    shape: Shape = field(repr=False)
    target: Target
    batch: int
    lengths: tuple[int, ...]

    @property
    def key(self) -> Key:
        """What the choice depends on."""
        return Key(
            template=TEMPLATE,
            template_hash=launch_digest(self.shape, self.target, self.batch),
            space_hash=SPACE.digest,
            problem=_problem(self.shape, self.batch, self.lengths),
            device=str(self.target),
            arch=self.target.arch,
        )


def config_of(way: str) -> Config:
    """The config that stands for one of both ways."""
    return Config.of({WAY: way}, SPACE.names)


def step_problems(
    graph: Graph, target: Target, max_sequences: int | None, max_model_len: int | None
) -> list[StepProblem]:
    """The steps whose way can be chosen, by their number of sequences.

    Args:
        graph: the fused decode graph.
        target: the device.
        max_sequences: most of them in a step; None: not known.
        max_model_len: tokens of the longest sequence; None: not known.

    Raises:
        UnsupportedError: a call that the one launch does not know, which is named, or a device that
            it is not measured on.
    """
    if target.is_cpu or target.arch < SINCE:
        raise UnsupportedError(
            "one launch for all layers",
            expected=f"a GPU of sm_{SINCE} or later, where it is worth measuring",
            found=target.name,
            remedy="Its decode steps run as a graph of separate kernels.",
        )
    shape = read_decode(graph)
    longest = max_model_len or TOKEN_BUCKETS[-1]
    lengths = tuple(length for length in LENGTHS if length < longest)
    # Steps are padded to the next of these numbers.
    most = max_sequences or BATCHES[-1]
    batches = [batch for batch in BATCHES if batch == 1 or batch // 2 < most]
    lengths = lengths or (max(1, token_bucket(longest) // 2),)
    return [StepProblem(graph, shape, target, batch, lengths) for batch in batches]


def _problem(shape: Shape, batch: int, lengths: Sequence[int]) -> Problem:
    """Sizes for people, and a digest of all calls, whatever their weights are called."""
    flow = [(step.form, step.x, step.out, step.residual) for step in shape.calls]
    text = repr((shape.forms, flow, sorted(shape.results.items()), shape.width, shape.head_dim))
    products = [form for step in shape.calls if isinstance(form := shape.form(step), Product)]
    codes = shape.codes
    return (
        ("calls", hashlib.sha256(text.encode()).hexdigest()[:16]),
        ("layers", sum(isinstance(shape.form(step), Attention) for step in shape.calls)),
        ("width", shape.width),
        ("vocabulary", products[-1].n),
        ("weight_bytes", shape.weight_bytes),
        ("dtype", "bf16"),
        ("codes", "none" if codes is None else repr(codes)),
        ("sequences", batch),
        ("context", lengths[0]),
        ("longest", lengths[-1]),
    )


@dataclass(frozen=True, slots=True)
class StepChoice:
    """What decode steps of a model are.

    Attributes:
        lowered: the decode Program, with one launch where it was chosen.
        batches: the numbers of sequences for which it was.
        facts: for the report: ``way`` in words, ``why``, and by number of sequences in ``steps``
            the way, how it is known, why, and the seconds of both ways.
    """

    lowered: Lowered
    batches: tuple[int, ...]
    facts: dict[str, Json]


def choose_steps(
    kernels: Lowered,
    graph: Graph,
    target: Target,
    max_sequences: int | None,
    max_model_len: int | None,
    tuning: Store | None,
) -> StepChoice:
    """The decode Program with one launch for those steps of which a record says that it is faster.

    Args:
        kernels: the Program of separate kernels.
        graph: what it computes.
        target: the device.
        max_sequences, max_model_len: as `step_problems` takes them.
        tuning: the records; None looks nothing up.
    """
    if tuning is None:
        return StepChoice(kernels, (), _facts(KERNELS, "tune='none' looks nothing up"))
    try:
        problems = step_problems(graph, target, max_sequences, max_model_len)
        keys = {one.batch: one.key for one in problems}
    except (UnsupportedError, *OTHER_TRITON) as error:
        return StepChoice(kernels, (), _facts(KERNELS, str(error)))
    here = conditions_here(driver=True)
    found = {batch: lookup(tuning, key, here) for batch, key in keys.items()}
    wanted = [batch for batch, one in found.items() if _way(one) == ONE_LAUNCH]
    lowered, refused = _with_launches(kernels, graph, target, wanted)
    steps = {batch: _step_facts(one, refused.get(batch)) for batch, one in found.items()}
    taken = tuple(batch for batch in wanted if batch not in refused)
    return StepChoice(lowered, taken, _facts(ONE_LAUNCH if taken else KERNELS, _why(taken), steps))


def _with_launches(
    kernels: Lowered, graph: Graph, target: Target, batches: Sequence[int]
) -> tuple[Lowered, dict[int, str]]:
    """The Program with one launch for these steps, and why not for some of them."""
    refused: dict[int, str] = {}
    while able := [batch for batch in batches if batch not in refused]:
        try:
            made = with_one_launch(kernels, graph, target, able)
            return replace(made, notes=kernels.notes), refused  # nothing fell back
        except UnsupportedError as error:
            why = str(error)
        for batch in able if len(able) > 1 else ():  # whose fault it is
            refused |= _with_launches(kernels, graph, target, [batch])[1]
        if not refused.keys() & {*able}:  # one alone, or only all together
            refused |= dict.fromkeys(able, why)
    return kernels, refused


def _way(found: Found) -> str:
    record = found.record
    if record is None or found.how not in ("exact", "shipped", "stale") or _by_another(found):
        return KERNELS
    return ONE_LAUNCH if record.config == config_of(ONE_LAUNCH) else KERNELS


def _by_another(found: Found) -> bool:
    """Whether another Triton compiled what was measured."""
    return found.how == "stale" and "triton" in found.differs


def _facts(
    way: str, why: str, steps: Mapping[int, dict[str, Json]] | None = None
) -> dict[str, Json]:
    """What the report says of decode steps."""
    found: dict[str, Json] = {str(batch): dict(one) for batch, one in (steps or {}).items()}
    return {"way": way, "why": why, "steps": found}


def _step_facts(found: Found, refused: str | None) -> dict[str, Json]:
    record, nearest = found.record, found.nearest
    if record is None or found.how not in ("exact", "shipped", "stale"):
        why = "nothing was measured"
        if nearest is not None and nearest.key.template == TEMPLATE:
            why = f"what was measured differs in {', '.join(found.differs)}"
        return {"way": KERNELS, "how": "default", "why": why, "tried": {}}
    tried: dict[str, Json] = {str(record.default[WAY]): record.default_seconds}
    tried |= {str(c[WAY]): seconds for c, seconds in record.runners_up}
    tried[str(record.config[WAY])] = record.seconds
    tried |= {str(c[WAY]): reason for c, reason in record.failed}
    why = f"measured {record.made}"
    if found.how == "stale":
        why += f", under another {', '.join(found.differs)}: tune again to measure it here"
    if refused is not None:
        why = f"one launch, which was measured to be faster, cannot be had: {refused}"
        return {"way": KERNELS, "how": "default", "why": why, "tried": tried}
    if _by_another(found):
        return {"way": KERNELS, "how": "default", "why": why, "tried": tried}
    how = "measured" if found.how == "exact" else found.how
    return {"way": _way(found), "how": how, "why": why, "tried": tried}


def _why(batches: Sequence[int]) -> str:
    if not batches:
        return "no record says that one launch is faster"
    numbers = ", ".join(map(str, batches))
    return f"one launch was measured to be faster for steps of {numbers}"

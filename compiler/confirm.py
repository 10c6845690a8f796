"""Whether what the tuner chose is faster end to end: decode steps of old and new choices, in turns.

A product that wins alone may lose in a step, where its neighbours leave other things in the L2. So
whole steps are timed, in blocks A B B A, whose sums a drift that is linear in time cannot tell
apart, and the rule of regressions (autotune/rule.py) judges their ratios: what is slower beyond
0.5%, in two runs that each load and capture anew, is put back to the default.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from ..autotune.key import Conditions, bucket
from ..autotune.lookup import lookup
from ..autotune.record import Record
from ..autotune.rule import Decision, Pair, Rule, RuleState, SeriesSpec, run_rule
from ..autotune.store import Store
from ..autotune.verdicts import Interval, Verdict
from ..codegen.base import get_backend
from ..codegen.triton.tuning.conditions import conditions_here
from ..codegen.triton.tuning.tunable import KernelTunable
from ..errors import UnsupportedError, UsageError
from ..ir.parser import parse_graph
from ..runtime.executor import MOST_DECODED
from ..runtime.image import EngineImage
from ..targets import Target

Side = Literal["old", "new"]

BATCHES = (1, 8, 32)
"""Sequences of the steps that are timed; the most that the engine takes come on top."""

SAME = 0.01
"""Ratios surely within this of 1 are the same; slower and faster are what surely is by half."""

SECONDS = 60.0
RULE = Rule(threshold=SAME, looks=(12, 20, 32, 48, 72))
_WORDS = {
    Verdict.REGRESSION: "slower",
    Verdict.IMPROVEMENT: "faster",
    Verdict.NO_CHANGE: f"same within {SAME:.0%}",
    Verdict.UNDECIDABLE: "not decidable",
}


class Steps(Protocol):
    """Runs decode steps of both sides; `confirm_steps.DecodeSteps` is the one."""

    def seconds(self, side: Side, batch: int) -> float:
        """Of one step, over a short block of them."""
        ...

    def reload(self) -> None:
        """Loads and captures both sides anew, in the other order."""
        ...


@dataclass(frozen=True, slots=True)
class BatchVerdict:
    """What became of steps of one size.

    Attributes:
        batch: sequences.
        verdict: of the rule.
        ratio: new over old, with the interval that was judged; None: nothing was measured.
        old, new: seconds of a step, medians.
        rounds: of four blocks each.
        note: why, where the verdict alone does not say.
    """

    batch: int
    verdict: Verdict
    ratio: Interval | None
    old: float | None
    new: float | None
    rounds: int
    note: str = ""

    @property
    def is_slower(self) -> bool:
        """Whether the new choices surely take longer."""
        return self.verdict is Verdict.REGRESSION

    @property
    def words(self) -> str:
        """The verdict, for people."""
        return _WORDS[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """Plain data that `json` writes; ends that are infinite are null."""
        ratio = self.ratio
        ends = None if ratio is None else [ratio.low, ratio.high]
        return {
            "batch": self.batch,
            "verdict": self.words,
            "ratio": None if ratio is None else ratio.value,
            "interval": ends and [x if math.isfinite(x) else None for x in ends],
            "old_seconds": self.old,
            "new_seconds": self.new,
            "rounds": self.rounds,
            "note": self.note,
        }


def recut(image: EngineImage, store: Store | None) -> EngineImage:
    """An engine with the kernels of its decode steps chosen anew; all else is the same.

    Args:
        image: of a causal LM with a decode Program of the Triton backend.
        store: what is known of kernels; None: the untuned defaults.

    Raises:
        UnsupportedError: another kind of engine.
    """
    decode, lm = image.decode, image.lm
    if image.backend != "triton" or lm is None or decode is None or not decode.graphs:
        raise UnsupportedError(
            f"decode steps of {image.name}",
            expected="a causal LM compiled with the Triton backend, with a decode Program",
            found=f"backend {image.backend!r}" + ("" if decode else ", no decode Program"),
            remedy="Compile it with backend='triton', for a GPU, and without deterministic=True.",
        )
    lowered = get_backend("triton").lower(
        parse_graph(decode.graphs[-1][1]),
        Target.parse(image.target),
        lm.max_model_len,
        max_sequences=lm.max_batch_size,
        tuning=store,
    )
    files = {**image.files, **lowered.files}
    return replace(image, files=files, decode=replace(decode, program=lowered.program))


def batches_of(image: EngineImage, wanted: Sequence[int] = ()) -> list[int]:
    """The sizes of the steps to time, ascending: those that are wanted, by default BATCHES and the
    most that the decode Program takes.

    Raises:
        UsageError: one that the engine does not take.
    """
    assert image.lm is not None
    most = min(image.lm.max_batch_size, MOST_DECODED)
    if wanted and not 1 <= min(wanted) <= max(wanted) <= most:
        raise UsageError(
            "option --batch",
            expected=f"from 1 to {most} sequences, which a decode step of this engine takes",
            found=", ".join(map(str, wanted)),
            remedy="Leave out those beyond, or compile with a larger --max-batch-size.",
        )
    return sorted({*wanted} or {*(size for size in BATCHES if size <= most), most})


def judge(
    steps: Steps,
    batches: Sequence[int],
    *,
    rule: Rule = RULE,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[int, int], None] = lambda done, most: None,
) -> list[BatchVerdict]:
    """Times steps of both sides in turns until each size is decided, or the time is over.

    Args:
        steps: of old and new.
        batches: the sizes.
        rule: when a difference is one.
        seconds: of measuring; what looks slower then may take as long again to be confirmed.
        clock: by which they are counted.
        progress: told the rounds that are done, and how many there are at most.
    """
    names = {f"batch {batch}": batch for batch in batches}
    turns = 0
    ends = clock() + seconds

    def measure(wanted: Sequence[str]) -> Mapping[str, Pair]:
        nonlocal turns
        turns += 1
        return {name: _abba(steps, names[name], new_first=turns % 2 == 0) for name in wanted}

    def again() -> Callable[[Sequence[str]], Mapping[str, Pair]]:
        nonlocal ends
        steps.reload()
        ends = clock() + seconds
        return measure

    def told(state: RuleState) -> None:
        runs = (*state.first.values(), *state.second.values())
        progress(max(map(len, runs), default=0), rule.looks[-1])

    found = run_rule(
        {name: SeriesSpec() for name in names},
        measure,
        rule,
        confirm=again,
        out_of_budget=lambda: clock() >= ends,
        on_round=told,
    )
    return [_verdict(batch, found[name]) for name, batch in names.items()]


def _abba(steps: Steps, batch: int, *, new_first: bool) -> Pair:
    order: tuple[Side, ...] = ("old", "new", "new", "old")
    if new_first:
        order = ("new", "old", "old", "new")
    taken: dict[Side, float] = {"old": 0.0, "new": 0.0}
    for side in order:
        taken[side] += steps.seconds(side, batch) / 2
    return taken["old"], taken["new"]


def _verdict(batch: int, found: Decision) -> BatchVerdict:
    return BatchVerdict(
        batch, found.verdict, found.ratio, found.old, found.new, found.rounds, found.note
    )


def used_by(problems: Sequence[KernelTunable], batch: int) -> list[KernelTunable]:
    """The problems whose kernels run in a decode step of so many sequences: of products and of
    attention those that are tuned for the next size up, or for the largest, of generated kernels
    those of decode steps. What is tuned for both tokens and sequences is for other steps.
    """
    problems = [one for one in problems if not {"tokens", "sequences"} <= {*dict(one.key.problem)}]
    facts = [dict(tunable.key.problem) for tunable in problems]
    wanted: dict[str, int] = {}
    for name in ("tokens", "sequences"):
        sizes = sorted({size for one in facts if isinstance(size := one.get(name), int)})
        if sizes:
            wanted[name] = bucket(batch, sizes)
    return [
        tunable
        for tunable, one in zip(problems, facts, strict=True)
        if any(one.get(name) == size for name, size in wanted.items())
        or 0 < int(one.get("rows", 0)) <= MOST_DECODED
    ]


def put_back(
    store: Store,
    problems: Sequence[KernelTunable],
    verdicts: Sequence[BatchVerdict],
    conditions: Conditions,
) -> list[Record]:
    """Puts the products that slower steps use back to their defaults, and keeps the reason: the
    config is among those that failed.

    Args:
        store: gets a record of the default for each; a shipped table is overruled, not changed.
        problems: of the engine.
        verdicts: of its steps.
        conditions: of this process.

    Returns:
        the new records.
    """
    done: dict[str, Record] = {}
    for verdict in verdicts:
        for tunable in used_by(problems, verdict.batch) if verdict.is_slower else ():
            found = lookup(store, tunable.key, conditions)
            record = found.record if found.how in ("exact", "shipped", "stale") else None
            if record is None or record.config == tunable.default:
                continue
            back = _defaulted(tunable, record, conditions, verdict)
            store.add(back)
            done[tunable.key.digest] = back
    return list(done.values())


def _defaulted(
    tunable: KernelTunable, record: Record, conditions: Conditions, verdict: BatchVerdict
) -> Record:
    assert verdict.ratio is not None
    ratio = verdict.ratio
    reason = (
        f"put back: a decode step of {verdict.batch} takes {ratio.value:.4f} times as long "
        f"[{ratio.low:.4f}, {ratio.high:.4f}]"
    )
    return replace(
        record,
        conditions=conditions,
        config=tunable.default,
        seconds=record.default_seconds,
        default=tunable.default,
        numerics=tunable.numerics(tunable.default),
        runners_up=tuple(pair for pair in record.runners_up if pair[0] != tunable.default),
        failed=(*record.failed, (record.config, reason)),
        budget=f"{record.budget}, put back",
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What comparing two choices came to.

    Attributes:
        verdicts: by batch, ascending; empty where both engines have the same kernels.
        put_back: the records of those products whose choice was slower, now the default.
    """

    verdicts: tuple[BatchVerdict, ...]
    put_back: tuple[Record, ...]

    @property
    def is_slower(self) -> bool:
        """Whether some step got slower."""
        return any(verdict.is_slower for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `json` writes."""
        return {
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "put_back": [record.to_json() for record in self.put_back],
        }


def confirm(
    old: EngineImage,
    new: EngineImage,
    problems: Sequence[KernelTunable],
    store: Store,
    batches: Sequence[int],
    *,
    seconds: float = SECONDS,
    progress: Callable[[int, int], None] = lambda done, most: None,
    start: Callable[[EngineImage, EngineImage, Sequence[int]], Steps] | None = None,
) -> Confirmed:
    """Times decode steps of the old and the new choices, and puts back what made some slower.

    Args:
        old, new: an engine with the kernels of both (`recut`).
        problems: of the engine.
        store: whose records the new choices are.
        batches: sizes of the steps (`batches_of`).
        seconds: of measuring, for the first run, and for one that confirms what was slower.
        progress: told the rounds that are done, and how many there are at most.
        start: makes the steps; `DecodeSteps` by default.

    Raises:
        EngineError: the engine is for another device.
        CapacityError: it does not fit the device.
    """
    assert old.decode is not None and new.decode is not None
    if old.decode.program == new.decode.program:
        return Confirmed((), ())
    if start is None:
        from .confirm_steps import DecodeSteps

        start = DecodeSteps
    steps = start(old, new, batches)
    verdicts = judge(steps, batches, seconds=seconds, progress=progress)
    back = put_back(store, problems, verdicts, conditions_here(driver=True))
    return Confirmed(tuple(verdicts), tuple(back))

"""Decode throughput by batch size: an engine beside its contenders and the floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from ...errors import TilewrightError, UsageError
from ...runtime.bucketing import Padding
from ...runtime.engine import CausalLMEngine
from ...runtime.params import SamplingParams
from ...targets import Target
from ..inspect.facts import Setting, bindings, final_graph, kv_bytes_per_token
from .bars import FLOOR, Bar, find_bars
from .contenders import Batch, Contender, absent, make_contender, synchronize
from .entrants import left_out
from .floor import find_linears
from .latency import Advance, bench_threads, engine_dtype
from .machine import Machine, probe_machine
from .reference import ReferenceModel
from .statistics import Ratio, paired_ratio
from .steady import Steady, steady_part

STEP_TOKENS = 2048  # that the scheduler lets a step compute
CONTEXT_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class BatchRival:
    """A contender at one batch size.

    Attributes:
        name, label: for options and for reading.
        runs: measured ones; none where it failed.
        error: why it failed.
        is_absent: whether that is because it is not installed.
        ratio: ours over its, tokens a second.
    """

    name: str
    label: str
    runs: tuple[Steady, ...] = ()
    error: str | None = None
    is_absent: bool = False
    ratio: Ratio | None = None


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One batch size.

    Attributes:
        batch: sequences.
        ours: measured runs of the engine.
        rivals: what it was compared with.
        bytes: that a step must read: the weights of its linears, and the KV cache of all sequences
            as it is half way through the steady steps.
        floor: seconds of a step at the measured read rate.
        nominal: seconds of a step at the peak rate of the device.
        bars: (bar, ratio, whether it is met).
        preemptions: sequences that lost their pages, in all of its runs: the KV memory is too
            small for all of them, and steps are not what they are called.
        padding_tokens: computed in all of its runs to fill batches.
        padding_share: of all tokens computed in them, 0 to 1.
    """

    batch: int
    ours: tuple[Steady, ...]
    rivals: tuple[BatchRival, ...]
    bytes: int
    floor: float
    nominal: float
    bars: tuple[tuple[Bar, Ratio, bool], ...] = ()
    preemptions: int = 0
    padding_tokens: int = 0
    padding_share: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """The engine's, median over the runs."""
        return statistics.median(run.tokens_per_second for run in self.ours)

    @property
    def seconds(self) -> float:
        """Of a step of the engine, median over the runs."""
        return statistics.median(run.seconds for run in self.ours)

    @property
    def share_of_floor(self) -> float:
        """How much of the step the floor is."""
        return self.floor / self.seconds

    @property
    def mbu(self) -> float:
        """Model bandwidth utilisation: bytes that must be read over what the device's peak rate
        could read in the time.
        """
        return self.nominal / self.seconds

    @property
    def fastest(self) -> BatchRival | None:
        """Of the contenders that ran."""
        ran = [rival for rival in self.rivals if rival.ratio is not None]
        return min(ran, key=lambda rival: rival.ratio.value, default=None)  # type: ignore[union-attr]


@dataclass(frozen=True, slots=True)
class Throughput:
    """What ``bench throughput`` found.

    Attributes:
        machine: load and rates.
        dtype: of the engine's weights, and of the contenders.
        context, new_tokens, repeat: what was run.
        results: by batch size.
    """

    machine: Machine
    dtype: str
    context: int
    new_tokens: int
    repeat: int
    results: tuple[BatchResult, ...]


def tokens_ahead(batch: int, context: int) -> int:
    """The most tokens that the first sequence has generated when the last one starts."""
    budget = max(1, STEP_TOKENS - batch)  # each running sequence takes one of them
    return -(-batch * context // budget)


def needed_length(batches: Sequence[int], context: int, new_tokens: int) -> int:
    """The context that an engine needs, in tokens."""
    longest = max(context + new_tokens + 1 + tokens_ahead(batch, context) for batch in batches)
    return -(-longest // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE


def measure_throughput(
    engine: CausalLMEngine,
    reference: Callable[[], ReferenceModel] | None,
    *,
    batches: Sequence[int],
    compare: Sequence[str] = (),
    context: int = 1024,
    new_tokens: int = 64,
    repeat: int = 3,
    advance: Advance = lambda phase, share: None,
) -> Throughput:
    """Measures greedy decoding of random prompts, all distinct, at each batch size.

    What is timed are ``new_tokens`` steps in which all sequences decode; prompts are computed
    before, and reported apart. Runs alternate with the contenders', the first of each is not
    counted. A contender that fails is reported, not raised.

    Args:
        engine: what to measure.
        reference: makes the uncompiled model; None to measure ours alone.
        batches: sequences at once.
        compare: names of contenders (``contenders.NAMES``).
        context: tokens of each prompt.
        new_tokens: steps that are timed.
        repeat: measured runs of each.
        advance: told what runs, and the share that is done.

    Raises:
        UsageError: batches or lengths that do not fit the engine, or are too small to measure.
    """
    _check(engine, batches, context, new_tokens, repeat)
    with bench_threads():
        advance("measuring the machine", 0.0)
        device = torch.device(engine.target.device_type)
        machine = probe_machine(str(engine.target), device)
        length = needed_length(batches, context, new_tokens)
        field_ = _Field(reference, compare, length, max(batches))
        found = []
        for index, batch in enumerate(batches):

            def at(phase: str, share: float, index: int = index, batch: int = batch) -> None:
                advance(f"batch {batch}: {phase}", (index + share) / len(batches))

            ours = _Ours(engine, device)
            sides = [_Side("tilewright", "tilewright", ours), *field_.sides()]
            _run_in_turns(sides, _Prompts(engine, batch, context), new_tokens, repeat, at)
            result = _result(engine, machine, batch, context, sides)
            share = ours.padding.share(ours.computed)
            found.append(
                replace(
                    result,
                    preemptions=ours.preemptions,
                    padding_tokens=ours.padding.total,
                    padding_share=share,
                )
            )
    dtype = str(engine_dtype(engine)).removeprefix("torch.")
    return Throughput(machine, dtype, context, new_tokens, repeat, tuple(found))


class _Ours(Contender):
    """The engine as its users run it."""

    label = "tilewright"

    def __init__(self, engine: CausalLMEngine, device: torch.device) -> None:
        self.engine, self.device, self.preemptions = engine, device, 0
        self._before = replace(engine.counters.padding), engine.counters.tokens_computed

    @property
    def padding(self) -> Padding:
        """What filled its batches."""
        before, now = self._before[0], self.engine.counters.padding
        return Padding(now.prefill - before.prefill, now.decode - before.decode)

    @property
    def computed(self) -> int:
        """Tokens that it has computed."""
        return self.engine.counters.tokens_computed - self._before[1]

    def run_batch(self, prompts: Sequence[list[int]], new_tokens: int) -> Batch:
        synchronize(self.device)  # what a contender left behind is not ours
        self.engine.reset_prefix_cache()
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        done = self.engine.generate(prompts, params)
        stamps = [
            [*accumulate(one.timings.itl, initial=one.timings.submitted + one.timings.ttft)]
            for one in done
        ]
        self.preemptions += sum(one.timings.preemptions for one in done)
        submitted = min(one.timings.submitted for one in done)
        return Batch(submitted, [one.token_ids for one in done], stamps)


@dataclass(slots=True)
class _Side:
    """One of those that run in turns."""

    name: str
    label: str
    contender: Contender | None
    error: str | None = None
    is_absent: bool = False
    runs: list[Steady] = field(default_factory=list)

    def go(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        """One run. Ours may raise; a rival that does is out, and says why."""
        if self.contender is None:
            return
        together = self.contender.starts_together
        ahead = 0 if together else tokens_ahead(len(prompts), len(prompts[0]))
        try:
            batch = self.contender.run_batch(prompts, new_tokens + 1 + ahead)
            self.runs.append(steady_part(batch, new_tokens))
        except Exception as error:
            if self.name == "tilewright":
                raise
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Takes it out."""
        if isinstance(error, TilewrightError):
            raise error
        text = " ".join(str(error).split())[:300]
        self.error, self.contender = f"{type(error).__name__}: {text}", None
        self.runs.clear()


class _Field:
    """Makes the contenders of each batch size: vLLM once for all, the others anew, for their
    caches have a size.
    """

    def __init__(
        self,
        reference: Callable[[], ReferenceModel] | None,
        compare: Sequence[str],
        length: int,
        most: int,
    ) -> None:
        self.reference, self.compare = reference, compare if reference is not None else ()
        self.length, self.most = length, most
        self._kept: dict[str, _Side] = {}
        self._model: ReferenceModel | None = None

    def sides(self) -> list[_Side]:
        """Those of one batch size."""
        return [self._side(name) for name in self.compare]

    def _side(self, name: str) -> _Side:
        if absent(name):
            return _Side(name, name, None, left_out(name).error, True)
        side = self._kept.get(name) or self._made(name)
        if name == "vllm":
            self._kept[name] = side
            return _Side(name, side.label, side.contender, side.error)
        return side

    def _made(self, name: str) -> _Side:
        side = _Side(name, name, None)
        assert self.reference is not None
        try:
            self._model = self._model or self.reference()
            side.contender = make_contender(name, self._model, self.length, self.most)
            dtype = str(self._model.dtype).removeprefix("torch.")
            side.label = f"{side.contender.label}, {dtype}"
        except Exception as error:  # whatever a compiler or another library may raise
            side.fail(error)
        return side


class _Prompts:
    """Random prompts, new ones in each round, the same for all who run in it."""

    def __init__(self, engine: CausalLMEngine, batch: int, context: int) -> None:
        self.shape, self.vocab = (batch, context), engine.config.vocab_size
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[list[list[int]]]:
        while True:
            found = torch.randint(self.vocab, self.shape, generator=self.generator)
            yield found.tolist()


def _run_in_turns(
    sides: Sequence[_Side], prompts: _Prompts, new_tokens: int, repeat: int, advance: Advance
) -> None:
    rounds = iter(prompts)
    for side in sides[1:]:
        advance(f"preparing {side.name}", 0.0)
        if side.contender is not None:
            try:
                side.contender.prepare(next(rounds))
            except Exception as error:
                side.fail(error)
    for index in range(repeat + 1):
        given = next(rounds)
        for which, side in enumerate(sides):
            advance(side.name, (index + which / len(sides)) / (repeat + 1))
            side.go(given, new_tokens)
    for side in sides:
        del side.runs[:1]  # it is not counted
        if side.contender is not None:
            side.contender.close()  # its cache makes room for the next batch size


def _result(
    engine: CausalLMEngine, machine: Machine, batch: int, context: int, sides: Sequence[_Side]
) -> BatchResult:
    ours, rivals = sides[0].runs, sides[1:]
    held = context + statistics.fmean(run.generated for run in ours)
    weights = weight_bytes_read(engine)
    read = weights + round(kv_bytes_per_token(engine.image) * batch * held)
    floor = read / machine.read_bytes_per_second
    peak = Target.parse(engine.image.target).dram_gb_per_s * 1e9
    rates = [run.tokens_per_second for run in ours]
    measured = tuple(
        BatchRival(
            rival.name,
            rival.label,
            tuple(rival.runs),
            rival.error,
            rival.is_absent,
            paired_ratio(rates, [r.tokens_per_second for r in rival.runs]) if rival.runs else None,
        )
        for rival in rivals
    )
    ratios = {rival.name: rival.ratio for rival in measured}
    ratios[FLOOR] = paired_ratio(rates, [batch / floor] * len(rates))
    bars = tuple(
        (bar, ratio, ratio.value >= bar.value)
        for bar in find_bars(machine.device, weights, batch)
        if bar.phase == "decode" and (ratio := ratios.get(bar.against)) is not None
    )
    return BatchResult(batch, tuple(ours), measured, read, floor, read / peak, bars)


def weight_bytes_read(engine: CausalLMEngine) -> int:
    """Bytes of the weights that a decode step must read: those of its linears."""
    graph = final_graph(engine.image)
    sizes = bindings(graph, engine.image, Setting("decode", 1, 1))
    return sum(one.weight_bytes for one in find_linears(graph, sizes))


def _check(
    engine: CausalLMEngine, batches: Sequence[int], context: int, new_tokens: int, repeat: int
) -> None:
    for name, value in (("--context", context), ("--new-tokens", new_tokens), ("--repeat", repeat)):
        if value < 1:
            raise UsageError(
                f"option {name}",
                expected="an integer, 1 or more",
                found=str(value),
                remedy="Raise it, or leave it out.",
            )
    check_batches(engine, batches)
    needed, limit = needed_length(batches, context, new_tokens), engine.config.max_model_len
    if needed > limit:
        raise UsageError(
            "options --context and --new-tokens",
            expected=f"at most {limit} tokens a sequence, the engine's context",
            found=f"{needed}: {context}, {new_tokens} that are timed, and those that the first "
            "sequences generate before the last one starts",
            remedy=f"Lower them, or compile with --max-model-len {needed}.",
        )


def check_batches(engine: CausalLMEngine, batches: Sequence[int]) -> None:
    """UsageError for batch sizes that the engine does not take."""
    limit, largest = engine.config.max_batch_size, max(batches)
    if min(batches) < 1:
        raise UsageError(
            "option --batch",
            expected="integers, 1 or more",
            found=str(min(batches)),
            remedy="Write for example --batch 1,8,32.",
        )
    if largest > limit:
        raise UsageError(
            "option --batch",
            expected=f"at most {limit} sequences, the engine's max_batch_size",
            found=str(largest),
            remedy=f"Lower it, or compile with --max-batch-size {largest}.",
        )

"""Executors of causal LMs: from a Step of the scheduler to logits, over a paged or a slot cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..codegen.base import get_backend
from ..errors import CapacityError, KernelError
from ..ir.dims import evaluate
from ..ir.types import TensorType
from .batch import DecodeBatch, MixedBatch
from .bucketing import Padding
from .decode_buffer import Launched
from .decode_graphs import DecodeGraphs, EagerDecode, obstacles, samples
from .host_pages import HostPages
from .params import SamplingParams
from .prefix_groups import fewest_sharing
from .row_sampling import RowSampler
from .runner import ProgramRunner
from .slot_batch import slot_batches
from .step import Capabilities, Step, padding_step
from .step_buffer import FIELDS, StepBuffer, StepShape
from .step_graphs import StepGraphs
from .token_choice import Masks

# Sequences that the decode Program takes: its products are cut for few rows, and beyond these the
# libraries' are quicker (1.6 times at 256).
MOST_DECODED = 128
# What attention by groups costs a layer, as KV bytes out of the L2 cache: its launches and parts
# took up to 20 µs (64 sequences of 32 heads of 128, H200), in which the plain kernel reads shared
# pages at 8.4 TB/s (benchmarks/NOTES.md; `prefix_groups.py` has what it is held against).
SHARED_BYTES = 160 << 20
_REHEARSED = 1024  # tokens: from there on prompts alone are a library's (codegen/triton/fresh.py)
_CUT = SamplingParams(temperature=1, top_k=50, top_p=0.9, min_p=0.1)
CACHE_PREFIXES = ("k_cache_", "v_cache_", "k_scale_", "v_scale_")


class _Caches:
    """The KV buffers of a Program: every input whose name says that it is one."""

    def __init__(self, runner: ProgramRunner) -> None:
        program = runner.program
        self.types: dict[str, TensorType] = {
            name: program.buffers[name]
            for name in program.inputs
            if name.startswith(CACHE_PREFIXES)
        }
        self.tensors: dict[str, torch.Tensor] = {}
        self.host: HostPages | None = None
        self.device = runner.device

    def allocate(self, sizes: dict[str, int]) -> None:
        """(Re)creates all buffers for these sizes; CapacityError when memory does not suffice."""
        self.tensors = {}
        shapes = {n: [evaluate(s, sizes) for s in t.shape] for n, t in self.types.items()}
        try:
            for name, shape in shapes.items():
                dtype = self.types[name].dtype.torch
                self.tensors[name] = torch.zeros(shape, dtype=dtype, device=self.device)
        except RuntimeError as error:
            self.tensors = {}
            needed = sum(
                math.prod(shape) * self.types[name].dtype.bytes for name, shape in shapes.items()
            )
            raise CapacityError(
                "KV cache",
                expected=f"{needed / 1e9:.2f} GB for {len(shapes)} buffers with {sizes}",
                found=f"{_free_memory(self.device)}: {str(error).splitlines()[0]}",
                remedy="Compile with a lower max_batch_size or max_model_len.",
            ) from error

    def allocate_host(self, count: int) -> None:
        """(Re)creates so many pages of the host; CapacityError when memory does not suffice."""
        self.host = HostPages(list(self.tensors.values()), count) if count else None

    def copy_pages(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        # In order: a page may be copied to, and then copied on.
        count = len(next(iter(self.tensors.values())))
        for source, destination in zip(sources, destinations, strict=True):
            if max(source, destination) < count:
                for tensor in self.tensors.values():
                    tensor[destination].copy_(tensor[source])
                continue
            assert self.host is not None
            if source < count:
                self.host.store(source, destination - count)
            else:
                self.host.load(source - count, destination)

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        total = 0
        for type_ in self.types.values():
            heads_and_dim = [size for size in type_.shape if isinstance(size, int)]
            total += heads_and_dim[0] * heads_and_dim[1] * type_.dtype.bytes
        return total


def _free_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return "too little"
    free, total = torch.cuda.mem_get_info(device)
    return f"{free / 1e9:.2f} GB free of {total / 1e9:.2f}"


class PagedExecutor:
    """Any mix of prefill and decode in one run, over pages; on a GPU a decode step is one replay of
    a CUDA graph, and so is a step of few tokens whose shape has been met before.

    Args:
        runner: of the Program that takes any step.
        max_sequences, max_model_len: what decode steps are captured for.
        max_tokens: the most tokens of other steps that are captured; 0 for none.
        decode: of the Program for decode steps alone, over the same weights and caches; if it has
            an output "tokens", such steps sample on the device. None, or one that no graph can
            hold, to use `runner` for all.
    """

    def __init__(
        self,
        runner: ProgramRunner,
        max_sequences: int = 1,
        max_model_len: int = 1,
        max_tokens: int = 0,
        *,
        decode: ProgramRunner | None = None,
    ) -> None:
        self.runner, self.caches = runner, _Caches(runner)
        self.max_sequences, self.max_model_len = max_sequences, max_model_len
        self.max_tokens = max_tokens
        self.padding = Padding()  # of captured steps: others have none
        self.graphs: DecodeGraphs | None = None
        self.steps: StepGraphs | None = None
        self.rows: RowSampler | None = None
        self._pages = 0  # of the longest sequence
        self._decode = decode if decode is not None and _replays(decode) else None
        able = self._decode is not None and samples(self._decode.program)
        self.capabilities = Capabilities(
            mixes=True,
            pages=True,
            shares=True,
            max_slots=None,
            samples=min(max_sequences, MOST_DECODED) if able else 0,
            shared_tokens=self._shared_tokens() if able else None,
            samples_mixed=max_sequences if able else 0,
        )

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        return self.caches.bytes_per_token

    def _shared_tokens(self) -> int | None:
        """`Capabilities.shared_tokens`: of a Program with attention by groups."""
        assert self._decode is not None
        if not self._decode.program.shares:
            return None
        layers = sum(name.startswith("k_cache_") for name in self.caches.types)
        return -(-SHARED_BYTES * layers // self.bytes_per_token)

    def allocate(self, num_pages: int, page_size: int, host_pages: int = 0) -> None:
        """(Re)creates the KV buffers, and forgets the graphs that hold their addresses."""
        self.graphs = self.steps = self.rows = None
        self.caches.allocate({"N": num_pages, "P": page_size})
        self.caches.allocate_host(host_pages)
        pages = self._pages = -(-self.max_model_len // page_size)
        captures = self.runner.device.type == "cuda" and _replays(self.runner)
        if self._decode is not None:
            self.graphs = self._graphs(self._decode, pages)
        elif captures:
            self.graphs = self._graphs(self.runner, pages)
        if self.graphs is not None:
            self.graphs.padding = self.padding
            if self.capabilities.samples_mixed:
                self.rows = RowSampler(
                    self.max_sequences,
                    self.runner.device,
                    self.graphs.queue,
                    self.runner.mode,
                    self.graphs.chooser,
                )
        if captures and self.graphs is not None and self.max_tokens:
            sizes = (self.max_sequences, pages, self.max_tokens)
            self.steps = StepGraphs(self.runner, self.caches.tensors, *sizes, self.graphs.queue)
            self.steps.padding = self.padding

    def _graphs(self, runner: ProgramRunner, pages: int) -> DecodeGraphs:
        most = self.max_sequences
        if runner is self._decode:
            most = min(most, MOST_DECODED)
        kind = DecodeGraphs if runner.device.type == "cuda" else EagerDecode
        return kind(runner, self.caches.tensors, most, pages)

    def copy_pages(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies pages, for forks that write."""
        self._join()
        self.caches.copy_pages(sources, destinations)

    def warm_up(self, words: int | None = None) -> None:
        """Makes now what steps would make when they first come: graphs of decode steps, and what
        libraries set up for prompts (over a second).

        Args:
            words: of a mask, if steps may have rows of a form.

        Raises:
            CapacityError: the device lacks memory for it.
        """
        if self.runner.device.type != "cuda":
            return
        try:
            if self.graphs is not None:
                least = self.capabilities.shared_tokens
                fewest = None if least is None else fewest_sharing(self.max_model_len, least)
                self.graphs.warm_up(fewest, words)
            self._rehearse()
        except torch.OutOfMemoryError as error:
            raise self._too_large(self.max_sequences, error) from error

    def _rehearse(self) -> None:
        """Runs prompts of nothing, which write to page 0: one alone, as libraries know them, and
        two, as a mix, with every way to sample.
        """
        length = min(self.max_model_len, _REHEARSED)
        for lengths in ([length], [length // 2, length - length // 2]):
            if len(lengths) > self.max_sequences or not all(lengths):
                continue
            step = padding_step(lengths, self._pages)
            if self.rows is None:
                self._run_mixed(step)
                continue
            key = tuple(range(len(step.seq_lens)))
            for params in (SamplingParams(), SamplingParams(temperature=1), _CUT):
                batch = MixedBatch(key, step, [], [params] * len(key), [0.5] * len(key))
                self.rows.launch(batch, None, partial(self._run_mixed, step)).tokens()

    def run(self, step: Step) -> torch.Tensor:
        """Logits f32[R, V] of the step's wanted rows, on the Program's device.

        Raises:
            CapacityError: the device lacks memory for the step's temporaries.
        """
        try:
            return self._run(step)
        except torch.OutOfMemoryError as error:
            raise self._too_large(len(step.token_ids), error) from error

    def launch(self, batch: DecodeBatch, after: Launched | None) -> Launched:
        """Queues a decode step that samples on the device, and does not wait for it.

        Args:
            batch: at most `capabilities.samples` sequences.
            after: the step that samples the batch's tokens, unless it holds them itself.

        Raises:
            CapacityError: the device lacks memory for the step's temporaries.
        """
        assert self.graphs is not None
        try:
            return self.graphs.launch(batch, after)
        except torch.OutOfMemoryError as error:
            raise self._too_large(len(batch.positions), error) from error

    def launch_mixed(self, batch: MixedBatch, after: Launched | None) -> Launched:
        """Queues a step of any kind that samples on the device, and does not wait for it.

        Args:
            batch: of at most `capabilities.samples_mixed` rows.
            after: the step that samples the batch's first tokens, unless it holds them itself.

        Raises:
            CapacityError: the device lacks memory for the step's temporaries.
        """
        assert self.graphs is not None and self.rows is not None
        assert after is None or (self.graphs.follows(after) and not after.open)
        self.graphs.queue.join()

        def run(feed: Callable[[torch.Tensor], None] | None) -> torch.Tensor:
            return self._run_mixed(batch.step, feed)

        try:
            launched = self.rows.launch(batch, after, run)
        except torch.OutOfMemoryError as error:
            raise self._too_large(len(batch.step.token_ids), error) from error
        self.graphs.hand_on(launched)
        return launched

    def choose(self, launched: Launched, masks: Masks) -> None:
        """Queues the sampling of an open step under the masks of its sequences.

        Raises:
            CapacityError: the device lacks memory for it.
        """
        assert self.graphs is not None
        try:
            self.graphs.choose(launched, masks)
        except torch.OutOfMemoryError as error:
            raise self._too_large(len(masks), error) from error

    def follows(self, launched: Launched) -> bool:
        """Whether a step can be launched `after` this one: its tokens are still on the device."""
        return self.graphs is not None and self.graphs.follows(launched)

    def recover(self) -> KernelError | None:
        """As `StepExecutor` says; of decode steps: no others are one launch."""
        return None if self._decode is None else self._decode.recover()

    def _too_large(self, tokens: int, error: Exception) -> CapacityError:
        return CapacityError(
            f"a step of {tokens} tokens",
            expected="device memory for its temporaries",
            found=f"{_free_memory(self.runner.device)}: {str(error).splitlines()[0]}",
            remedy="Compile with a lower max_batch_size or max_model_len, or free memory.",
        )

    def _join(self) -> None:
        """Puts what follows behind what is in flight."""
        if self.graphs is not None:
            self.graphs.queue.join()

    def _run(self, step: Step) -> torch.Tensor:
        if self.graphs is not None:
            replayed = self.graphs.run(step)
            if replayed is not None:
                return replayed
        self._join()
        return self._run_mixed(step).float()

    def _run_mixed(
        self, step: Step, feed: Callable[[torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """Logits [R, V] in the model's type."""
        fresh = _is_fresh(step)
        if self.steps is not None:
            replayed = self.steps.run(step, fresh, feed)
            if replayed is not None:
                return replayed
        inputs = {name: getattr(step, name) for name in FIELDS} | self.caches.tensors
        if self.runner.device.type == "cuda":
            metadata = StepBuffer(StepShape.of(step), self.runner.device)
            metadata.fill(step)
            inputs |= metadata.views
        if feed is not None:
            feed(inputs["token_ids"])
        return self.runner.run(inputs, fresh=fresh)["logits"]


def _is_fresh(step: Step) -> bool:
    """Whether the step is one sequence alone, all of whose keys are of its own tokens."""
    return len(step.seq_lens) == 1 and int(step.seq_lens[0]) == len(step.token_ids)


def _replays(runner: ProgramRunner) -> bool:
    """Whether the Program's steps can be replayed: the CPU takes all, a graph not every op."""
    return runner.device.type != "cuda" or not obstacles(runner.program)


class SlotExecutor:
    """Whole prompts, or one token of each running sequence, over slots of a static length.

    The cache's rows are the slots. A decode step runs on the shortest contiguous range of rows that
    holds all its slots; rows of the range that are not in the step compute a token that nobody
    reads, at the position that their sequence writes next, so that they leave nothing behind that
    is read. Prompts run once for each run of neighbouring slots (`slot_batch.py`).
    """

    def __init__(self, runner: ProgramRunner, max_slots: int) -> None:
        self.runner, self.caches = runner, _Caches(runner)
        self.capabilities = Capabilities(
            mixes=False, pages=False, shares=False, max_slots=max_slots, prefills=max_slots
        )
        self.padding = Padding()
        self.lengths: list[int] = []
        loaders = {call.loader for call in runner.program.calls}
        self._clears = any(get_backend(loader).reads_unseen for loader in loaders)

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        return self.caches.bytes_per_token

    def allocate(self, num_pages: int, page_size: int, host_pages: int = 0) -> None:
        """(Re)creates the KV buffers: one slot a page, and none on the host."""
        self.caches.allocate({"B": num_pages, "L": page_size})
        self.lengths = [0] * num_pages

    def copy_pages(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies slots, for forks."""
        self.caches.copy_pages(sources, destinations)
        for source, destination in zip(sources, destinations, strict=True):
            self.lengths[destination] = self.lengths[source]

    def recover(self) -> KernelError | None:
        """As `StepExecutor` says."""
        return self.runner.recover()

    def run(self, step: Step) -> torch.Tensor:
        """Logits f32[R, V] of the step's wanted rows."""
        slots = step.block_tables[:, 0].tolist()
        fresh = len(step.token_ids) == int(step.seq_lens.sum())  # prompts, from their first token
        for slot, length in zip(slots, step.seq_lens.tolist(), strict=True):
            self.lengths[slot] = length
            if fresh and self._clears:
                for tensor in self.caches.tensors.values():
                    tensor[slot].zero_()
        if len(step.token_ids) > len(slots) > 1:
            return self._prefill(step, slots)
        first, stop = min(slots), max(slots) + 1
        self.padding.decode += stop - first - len(slots)
        return self._run(self._rows(step, slots, first, stop), first, stop)

    def _prefill(self, step: Step, slots: list[int]) -> torch.Tensor:
        found = []
        for batch in slot_batches(step, slots):
            self.padding.prefill += batch.padding
            found.append((batch.rows, self._run(batch.inputs, batch.first, batch.stop)))
        rows = torch.cat([rows for rows, _ in found])
        return torch.cat([logits for _, logits in found])[rows.argsort()]

    def _run(self, inputs: dict[str, torch.Tensor], first: int, stop: int) -> torch.Tensor:
        caches = {name: tensor[first:stop] for name, tensor in self.caches.tensors.items()}
        return self.runner.run(inputs | caches)["logits"].float().cpu()

    def _rows(self, step: Step, slots: list[int], first: int, stop: int) -> dict[str, torch.Tensor]:
        if slots == list(range(first, stop)):
            return {
                "token_ids": step.token_ids,
                "positions": step.positions,
                "seq_lens": step.seq_lens,
                "logits_indices": step.logits_indices,
            }
        rows = torch.tensor([slot - first for slot in slots])
        limit = next(iter(self.caches.tensors.values())).shape[2]
        lens = torch.tensor([min(n + 1, limit) for n in self.lengths[first:stop]])
        lens[rows] = step.seq_lens.long()
        ids = torch.zeros(stop - first, dtype=step.token_ids.dtype)
        ids[rows] = step.token_ids
        return {
            "token_ids": ids,
            "positions": lens - 1,
            "seq_lens": lens.int(),
            "logits_indices": rows[step.logits_indices],
        }

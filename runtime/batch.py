"""From the scheduler's plan to what an executor takes: a step's tensors, or a batch of decodes, or
of anything, that samples its next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .block_tables import TablePatch
from .params import SamplingParams
from .plan import Chunk, Plan
from .pool import KVPool
from .prefix_groups import PrefixGroups, find_groups
from .step import Step


def build_step(plan: Plan, pool: KVPool) -> Step:
    """The tensors of a plan with at least one chunk. A few microseconds a tensor at decode; what a
    long prompt brings is arrays already (4096 numbers of a list cost 0.3 ms). A token that is in
    flight is 0."""
    query_start, seq_lens, logits_indices = [0], [], []
    slides, chunks = pool.slides, plan.chunks
    for chunk in chunks:
        count = len(chunk.slots)
        if chunk.seq.request.prompt_logprobs is not None:
            logits_indices += [query_start[-1] + place - chunk.start for place in chunk.scored]
        query_start.append(query_start[-1] + count)
        gap = pool.gap(chunk.seq.id) if slides else 0
        seq_lens.append(chunk.start + count - gap)
        if chunk.completes:
            logits_indices.append(query_start[-1] - 1)
    return Step(
        token_ids=_joined(chunks, _token_id, _token_ids),
        positions=_joined(chunks, lambda chunk: chunk.start, _positions),
        query_start=torch.tensor(query_start, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        slot_mapping=_joined(chunks, lambda chunk: int(chunk.slots[0]), lambda chunk: chunk.slots),
        block_tables=pool.block_tables([chunk.seq.id for chunk in chunks]),
        logits_indices=torch.tensor(logits_indices, dtype=torch.int64),
    )


def _joined(
    chunks: list[Chunk], of_one: Callable[[Chunk], int], of_many: Callable[[Chunk], ArrayLike]
) -> torch.Tensor:
    """i64[T], by chunk: a number of those of one token, an array of the others. Not to be written
    to: it may be what a request holds.
    """
    pieces: list[ArrayLike] = []
    ones: list[int] = []
    for chunk in chunks:
        if len(chunk.slots) == 1:
            ones.append(of_one(chunk))
        else:
            pieces += [ones, of_many(chunk)]
            ones = []
    every = (np.asarray(piece, dtype=np.int64) for piece in (*pieces, ones))
    arrays = [array for array in every if len(array)]
    return torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))


def _token_id(chunk: Chunk) -> int:
    tokens = chunk.seq.tokens
    return tokens[chunk.start] if chunk.start < len(tokens) else 0


def _token_ids(chunk: Chunk) -> ArrayLike:
    start, stop = chunk.start, chunk.start + len(chunk.slots)
    known = chunk.seq.request.prompt_ids
    return known[start:stop] if stop <= len(known) else chunk.seq.tokens[start:stop]


def _positions(chunk: Chunk) -> ArrayLike:
    return np.arange(chunk.start, chunk.start + len(chunk.slots))


_PATCHES = 64  # of block tables, then they are written together
_LAST = 4  # patches that a turn (`decode_buffer.py`) may have missed, and more


@dataclass(slots=True)  # not frozen: making one would take thrice as long
class DecodeBatch:
    """One token of each of B sequences, and how to sample the next; ready to be written.

    Attributes:
        key: the sequences' ids. The same key has the same params.
        token_ids: None if they are what the step before samples.
        feed_rows: where in that step each sequence is; None if it has the same rows.
        positions: i64[B], of the tokens; a sequence's length is one more, less its gap.
        slots: i64[B], where the tokens' K and V are written.
        params: of each sequence's request.
        uniform: f64[B], the next number of each sequence's stream, 0 for greedy ones; None if all
            are.
        tables: i32[B, M], the page ids of each sequence, unused entries 0, but for patches.
        tables_version: another one whenever the tables are others, never used again.
        held: whether a sequence has a form, so that its row waits for a mask.
        gaps: of each sequence the tokens that its table leaves out; None if no table does.
        groups: which of them share pages; None if that is not worth to be known.
        patches: what the tables lack, one for each version up to this one; until the next batch is
            built.
        ends: i64[B], the positions and one, if they are at hand.
    """

    key: tuple[int, ...]
    token_ids: list[int] | None
    feed_rows: list[int] | None
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    params: list[SamplingParams]
    uniform: NDArray[np.float64] | None
    tables: np.ndarray
    tables_version: int
    held: bool = False
    gaps: list[int] | None = None
    groups: PrefixGroups | None = None
    patches: Sequence[TablePatch] = ()
    ends: NDArray[np.int64] | None = None

    def bring(self, tables: np.ndarray, version: int) -> None:
        """Brings other tables i32[B, M] of another version, -1 for none, up to date. Rows may be
        longer there.
        """
        patches, missed = self.patches, self.tables_version - version
        if version < 0 or missed > len(patches):
            missed, width = len(patches), self.tables.shape[1]
            tables[:, :width] = self.tables
            tables[:, width:] = 0
        for patch in patches[len(patches) - missed :]:
            patch.write(tables)


@dataclass(frozen=True, slots=True)
class MixedBatch:
    """A step of any kind, and how to sample its next tokens.

    Attributes:
        key: the ids of the sequences whose next tokens it samples, as the rows of its logits are.
        step: its tensors. The token ids that the step before samples are 0 there; they come first.
        feed_rows: where in the step before each of these is.
        params: of each row's request.
        uniform: the next number of each row's stream, 0 for greedy ones.
    """

    key: tuple[int, ...]
    step: Step
    feed_rows: list[int]
    params: list[SamplingParams]
    uniform: list[float]


def build_mixed(plan: Plan, pool: KVPool, after: DecodeBatch | MixedBatch | None) -> MixedBatch:
    """The batch of a plan in which a sequence samples its next token wherever it completes.

    Args:
        plan: the chunks of tokens in flight, one token each, come first.
        pool: where they write.
        after: the batch in flight that samples these tokens; None if all are known.
    """
    chunks = [chunk for chunk in plan.chunks if chunk.completes]
    fed = [seq.id for seq in plan.seqs if seq.in_flight]
    return MixedBatch(
        tuple([chunk.seq.id for chunk in chunks]),
        build_step(plan, pool),
        [] if after is None else _places(tuple(fed), after.key),
        [chunk.seq.sampling.params for chunk in chunks],
        _uniform(chunks),
    )


class DecodeBatches:
    """Builds decode batches, and remembers their tables and groups, which seldom change from one to
    the next while sequences are few.

    Args:
        pool: of the sequences.
        shared_tokens: as in `Capabilities`.
    """

    def __init__(self, pool: KVPool, shared_tokens: int | None = None) -> None:
        self._pool = pool
        self._least = None if pool.slides else shared_tokens
        self._groups: PrefixGroups | None = None
        self._key: tuple[int, ...] | None = None
        self._version = 0
        self._tables: NDArray[np.int32] = np.zeros((0, 0), dtype=np.int32)
        self._gaps: list[int] | None = None
        self._patches: list[TablePatch] = []

    def forget(self) -> None:
        """To be called whenever pages may have changed hands other than by the plans built here."""
        self._key = None

    def build(self, plan: Plan, after: DecodeBatch | MixedBatch | None) -> DecodeBatch:
        """The batch of a plan of `decodes` alone.

        Args:
            plan: all its sequences sample their next token.
            after: the batch in flight that samples the plan's tokens; None if they are known.
        """
        decodes = plan.decodes
        assert decodes is not None and not plan.beside
        key, positions = decodes.ids, plan.positions
        if (key is not self._key and key != self._key) or plan.copies:
            self._gather(key)
            if self._least is not None:
                starts = positions.tolist()
                self._groups = find_groups(self._tables, starts, self._pool.page_size, self._least)
        else:
            self._follow(plan)
        return DecodeBatch(
            key,
            [seq.tokens[-1] for seq in decodes.seqs] if after is None else None,
            None if after is None else _rows(key, after),
            positions,
            plan.slots,
            decodes.params,
            decodes.uniform(positions),
            self._tables,
            self._version,
            decodes.held,
            self._gaps,
            self._sharing(positions),
            self._patches,
            decodes.positions,  # of the step behind this one
        )

    def _gather(self, key: tuple[int, ...]) -> None:
        self._key, self._version, self._patches = None, self._version + 1, []
        self._tables = self._pool.block_tables(key).numpy()
        self._gaps = [self._pool.gap(seq) for seq in key] if self._pool.slides else None
        self._key = key

    def _follow(self, plan: Plan) -> None:
        """Others of the same sequences: with new pages, and only then without some."""
        patch = self._opened(plan) if plan.opened is None else plan.opened
        if not patch.width:
            return
        assert self._key is not None
        key = self._key
        if self._pool.slides:
            self._gather(key)
            return
        self._key, self._version = None, self._version + 1
        if patch.width > self._tables.shape[1]:
            self._tables = _widened(self._tables, patch.width)
        if len(self._patches) >= _PATCHES:
            self._fold()
        self._patches.append(patch)
        self._key = key

    def _fold(self) -> None:
        """Writes the patches into the tables, but for the last, which buffers still take."""
        old = self._patches[:-_LAST]
        tables = self._tables.copy()  # a batch has that one
        for patch in old:
            patch.write(tables)
        self._tables = tables
        self._patches = self._patches[-_LAST:]

    def _opened(self, plan: Plan) -> TablePatch:
        """A page is new where its first place is taken."""
        size, positions = self._pool.page_size, plan.positions
        (rows,) = (positions % size == 0).nonzero()
        columns = positions[rows] // size
        width = 1 + int(columns.max()) if len(rows) else 0
        return TablePatch(rows, columns, plan.slots[rows] // size, width)

    def _sharing(self, positions: NDArray[np.int64]) -> PrefixGroups | None:
        """The groups, for as long as they pay: less and less, as sequences grow apart."""
        groups, least = self._groups, self._least
        if groups is None or least is None or groups.pay(int(positions.sum()), least):
            return groups
        self._groups = None
        return None


def _widened(tables: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    found = np.zeros((len(tables), width), dtype=np.int32)
    found[:, : tables.shape[1]] = tables
    return found


def _uniform(chunks: list[Chunk]) -> list[float]:
    sequences = [chunk.seq for chunk in chunks]
    return [
        0.0 if seq.sampling.params.is_greedy else seq.sampling.uniform(seq.in_flight)
        for seq in sequences
    ]


def _rows(key: tuple[int, ...], before: DecodeBatch | MixedBatch) -> list[int] | None:
    """None if a decode step has left the tokens where the next one reads them."""
    same = key is before.key or key == before.key
    if same and isinstance(before, DecodeBatch):
        return None
    return _places(key, before.key)


def _places(key: tuple[int, ...], before: tuple[int, ...]) -> list[int]:
    rows = {one: row for row, one in enumerate(before)}
    return [rows[one] for one in key]

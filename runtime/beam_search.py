"""Beam search over the loop's executor and pool: the likeliest sequences rather than the likeliest
next tokens, by the rules of `beams.py`.

A beam that goes on in several ways is forked: its pages are shared, and copied when one writes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .beams import BeamCompletion, BeamSearchParams, Continuation, Search
from .intake import check_prompt
from .loop import GenerationLoop, StreamingTokenizer
from .pool import PageCopy
from .sampling import check_finite
from .step import Step

_ids = itertools.count(-2, -1)  # requests number their sequences from 0; -1 is a text to be scored


class BeamSearcher:
    """Searches with a loop's memory, a step of all beams behind each of the loop's own; its other
    requests give up their pages where they are short.

    Args:
        loop: whose executor, pool and lock it takes.
        eos_token_ids: that end a sequence.
        tokenizer: for the text; None leaves it empty.
    """

    def __init__(
        self,
        loop: GenerationLoop,
        eos_token_ids: Collection[int],
        tokenizer: StreamingTokenizer | None,
    ) -> None:
        self._loop, self._eos, self._tokenizer = loop, frozenset(eos_token_ids), tokenizer

    def search(
        self, prompts: Sequence[list[int]], params: BeamSearchParams
    ) -> list[list[BeamCompletion]]:
        """The `beam_width` best sequences that it finds behind each prompt, best first.

        Raises:
            UsageError: a prompt that cannot be taken, or more beams than sequences run at once;
                nothing has run.
            CapacityError: the beams outgrow the KV memory.
            VerificationError: the model gave NaN logits.
        """
        loop = self._loop
        if params.beam_width > loop.scheduler.max_running:
            raise UsageError(
                "BeamSearchParams.beam_width",
                expected=f"at most {loop.scheduler.max_running}, the sequences that run at once",
                found=str(params.beam_width),
                remedy="Take fewer beams, or compile with a larger max_batch_size.",
            )
        waiting = [self._new(index, prompt, params) for index, prompt in enumerate(prompts)]
        searches = Searches(self, params, waiting)
        loop.invite(searches)
        try:
            while not searches.done:
                loop.step()
        finally:
            with loop.lock:
                loop.dismiss(searches)
                searches.end()
        if searches.error is not None:
            raise searches.error
        return [searches.found[index] for index in range(len(prompts))]

    def advance(self, searches: Searches) -> None:
        """Starts those that have room, and takes one step of all that run."""
        params, active = searches.params, searches.active
        self._loop.settle()
        while searches.waiting and self._fits(active, searches.waiting[0], params):
            active.append(searches.waiting.pop(0))
            self._start(active[-1], params)
        self._step([one for one in active if not one.done], params)
        for one in [one for one in active if one.done]:
            active.remove(one)
            self.free(one)
            searches.found[one.index] = self._completions(one)

    def _new(self, index: int, prompt: list[int], params: BeamSearchParams) -> Search:
        loop, capacity = self._loop, self._loop.pool.max_tokens
        check_prompt(
            prompt,
            max_model_len=loop.max_model_len,
            max_tokens=capacity,
            vocab_size=loop.vocab_size,
        )
        longest = min(loop.max_model_len, capacity + 1)  # the last token needs no K and V
        most = min(params.max_new_tokens, longest - len(prompt))
        return Search(index, list(prompt), most, [next(_ids)])

    def _fits(self, active: list[Search], search: Search, params: BeamSearchParams) -> bool:
        """Whether one more search has room beside the others, however long they all get."""
        width, pool = params.beam_width, self._loop.pool
        if not active:
            return True
        if (len(active) + 1) * width > self._loop.scheduler.max_running:
            return False
        most = width * pool.most_pages(pool.max_tokens)
        needed = sum(min(one.most_pages(width, pool.page_size), most) for one in (*active, search))
        return needed <= min(pool.max_tokens // pool.page_size, pool.num_pages - 1)

    def _start(self, search: Search, params: BeamSearchParams) -> None:
        """Computes the prompt, and takes the first tokens of the beams."""
        loop, (seq,) = self._loop, search.seqs
        copies: list[PageCopy] = []
        start = 0
        if loop.scheduler.reuses:
            start, copies = loop.pool.reuse(seq, search.prompt, "")
        else:
            loop.pool.add(seq)
        most = len(search.prompt)
        if loop.scheduler.capabilities.mixes:
            most = min(loop.scheduler.max_prefill_tokens, loop.pool.max_append)
        while True:
            chunk = search.prompt[start : start + most]
            last = start + len(chunk) == len(search.prompt)
            logits = self._run([(seq, start, chunk)], copies, wanted=last)
            start, copies = start + len(chunk), []
            if last:
                break
        self._advance(search, logits, params)
        if loop.scheduler.reuses and search.seqs:
            loop.pool.keep(search.seqs[0], search.prompt, "")

    def _step(self, searches: list[Search], params: BeamSearchParams) -> None:
        """One more token of every beam."""
        rows = [
            (seq, len(one.prompt) + len(output) - 1, output[-1:])
            for one in searches
            for seq, output in zip(one.seqs, one.outputs, strict=True)
        ]
        if not rows:
            return
        logits = self._run(rows, [], wanted=True)
        first = 0
        for one in searches:
            count = len(one.seqs)
            self._advance(one, logits[first : first + count], params)
            first += count

    def _advance(self, search: Search, logits: Tensor, params: BeamSearchParams) -> None:
        """Takes the next tokens of a search's beams from their logits f32[beams, V]."""
        check_finite(logits.amax(-1).tolist())
        totals = torch.tensor(search.totals, dtype=torch.float64, device=logits.device)
        sums = (logits.double().log_softmax(-1) + totals[:, None]).flatten()
        count = max(2, 1 + len(self._eos)) * params.beam_width
        best = sums.topk(min(count, len(sums)))
        places = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        vocab = logits.shape[-1]
        ranked = [Continuation(place // vocab, place % vocab, total) for place, total in places]
        going = search.take(ranked, params, self._eos)
        self._loop.counters.sampled_tokens += len(going)
        self._reorder(search, [one.parent for one in going])

    def _reorder(self, search: Search, parents: list[int]) -> None:
        """Makes the beams those that continue `parents`: a parent's first child takes its pages,
        the others are forked, after those without children have made room.
        """
        loop, before = self._loop, search.seqs
        for index, seq in enumerate(before):
            if index not in parents:
                loop.pool.free(seq)
        search.seqs, copies = [], []
        for place, parent in enumerate(parents):
            seq = before[parent]
            if parent in parents[:place]:
                loop.make_room(loop.pool.fork_pages_needed(seq))
                seq = next(_ids)
                copies += loop.pool.fork(before[parent], seq)
            search.seqs.append(seq)
        self._copy(copies)

    def _run(
        self, rows: list[tuple[int, int, list[int]]], copies: list[PageCopy], *, wanted: bool
    ) -> Tensor:
        """Computes tokens: (sequence, place of the first, token ids) of each row; logits f32[rows,
        V] of their last tokens, if they are wanted.
        """
        started, pool = time.perf_counter(), self._loop.pool
        slots: list[np.ndarray] = []
        for seq, _, tokens in rows:
            self._loop.make_room(pool.pages_needed(seq, len(tokens)))
            found, more = pool.append(seq, len(tokens))
            slots.append(np.asarray(found, dtype=np.int64))
            copies = [*copies, *more]
        self._copy(copies)
        counts = [len(tokens) for _, _, tokens in rows]
        stops = list(itertools.accumulate(counts))
        step = Step(
            token_ids=torch.tensor([token for _, _, tokens in rows for token in tokens]),
            positions=torch.cat([torch.arange(at, at + len(ids)) for _, at, ids in rows]),
            query_start=torch.tensor([0, *stops], dtype=torch.int32),
            seq_lens=torch.tensor(
                [at + len(ids) - pool.gap(seq) for seq, at, ids in rows], dtype=torch.int32
            ),
            slot_mapping=torch.from_numpy(np.concatenate(slots)),
            block_tables=pool.block_tables([seq for seq, _, _ in rows]),
            logits_indices=torch.tensor(
                [n - 1 for n in stops] if wanted else [], dtype=torch.int64
            ),
        )
        logits = self._loop.executor.run(step)
        self._count(rows, time.perf_counter() - started)
        return logits

    def _count(self, rows: list[tuple[int, int, list[int]]], seconds: float) -> None:
        counters, tokens = self._loop.counters, sum(len(ids) for _, _, ids in rows)
        counters.steps += 1
        counters.tokens_computed += tokens
        if tokens > len(rows):
            counters.prefill_tokens += tokens
            counters.prefill_seconds += seconds
        else:
            counters.decode_tokens += tokens
            counters.decode_seconds += seconds

    def _copy(self, copies: list[PageCopy]) -> None:
        if copies:
            sources, destinations = zip(*copies, strict=True)
            self._loop.executor.copy_pages(sources, destinations)
            self._loop.counters.copied_pages += len(copies)

    def forget(self) -> None:
        """After an error: copies that were planned may not have been made."""
        self._loop.forget_copies()

    def free(self, search: Search) -> None:
        """Lets go of the pages of its beams."""
        for seq in search.seqs:
            self._loop.pool.free(seq)

    def _completions(self, search: Search) -> list[BeamCompletion]:
        return [self._completion(tokens, score) for score, tokens in search.finished]

    def _completion(self, tokens: list[int], score: float) -> BeamCompletion:
        ended = tokens[-1] in self._eos
        text = ""
        if self._tokenizer is not None:
            decoder = self._tokenizer.stream()
            pieces = [decoder.push(token) for token in (tokens[:-1] if ended else tokens)]
            text = "".join(pieces) + decoder.finish()
        return BeamCompletion(tokens, text, score, "stop" if ended else "length")


@dataclass(slots=True)
class Searches:
    """The searches of one call, as the loop's guest.

    Attributes:
        searcher: takes their steps.
        params: of all of them.
        waiting, active: searches that have not started, and that run.
        found: the completions of those that have ended, by their index.
        error: what ended all of them.
    """

    searcher: BeamSearcher
    params: BeamSearchParams
    waiting: list[Search]
    active: list[Search] = field(default_factory=list)
    found: dict[int, list[BeamCompletion]] = field(default_factory=dict)
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether there is nothing more to do."""
        return self.error is not None or not (self.waiting or self.active)

    def advance(self) -> None:
        """One step of them. Their errors are their caller's, who may be another than the one that
        steps the loop; not so an interrupt.
        """
        if self.done:
            return
        try:
            self.searcher.advance(self)
        except BaseException as error:
            self.error = error
            self.searcher.forget()
            self.end()
            if not isinstance(error, Exception):
                raise

    def end(self) -> None:
        """Frees the pages of those that run."""
        for one in self.active:
            self.searcher.free(one)
        self.active.clear()

"""Who computes how many tokens in the next step: continuous batching with chunked prefill.

First come, first served, within a priority; who waits takes the place of who runs at a lower one.
Decode goes before prefill, so that a long prompt never stalls the others
by more than the step's token budget (Sarathi-Serve, Agrawal et al. 2024). When pages run out, the
last in rank gives up its pages and is computed anew later (vLLM's recompute preemption), but
for what the prefix cache still has of it then.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable
from operator import attrgetter

from ..errors import CapacityError, UsageError
from .bucketing import LengthBuckets
from .decodes import Decodes
from .plan import Chunk, Plan
from .pool import KVPool, PageCopy
from .request import Request, Sequence
from .step import Capabilities

_rank = attrgetter("rank")
_deadline = attrgetter("deadline")

STEP_TOKENS = 2048  # large enough for products to be bound by arithmetic
CROWD = 8  # waiting sequences
ROWS = 128  # tokens of a tile of the products: a step of 8193 takes as long as one of 8320
SCORED_TOKENS = 256  # of a prompt, where each wants its logits: 128 MB of 128k a token


class Scheduler:
    """Keeps the waiting and the running sequences, both by rank, and plans steps.

    Args:
        pool: where K and V live.
        capabilities: what the executor takes. One that does not mix gets whole prompts, or one
            token of each running sequence.
        max_tokens_per_step: the token budget of a step, for executors that mix.
        max_prefill_tokens: the budget of a step while no sequence decodes, if it is larger: nobody
            waits for a token then. And from when a crowd waits, that would wait all the longer,
            until the last of it is computed; tokens of decodes come beside it then, and whatever
            fills the last `ROWS`.
        max_num_seqs: the most sequences that run at once.
        clock: seconds that never go back, for deadlines, and for the loop's times.
        buckets: prompts of one are computed together, by executors that do not mix; None for each
            prompt alone.

    Attributes:
        going: all that run, if each goes on whatever is sampled; None once one joins, leaves, is
            full or goes another way.

    Raises:
        UsageError: a budget or a number of sequences below 1.
    """

    def __init__(
        self,
        pool: KVPool,
        capabilities: Capabilities,
        *,
        max_tokens_per_step: int = STEP_TOKENS,
        max_prefill_tokens: int = 0,
        max_num_seqs: int = 256,
        clock: Callable[[], float] = time.perf_counter,
        buckets: LengthBuckets | None = None,
    ) -> None:
        for name, value in (
            ("max_tokens_per_step", max_tokens_per_step),
            ("max_num_seqs", max_num_seqs),
        ):
            if value < 1:
                raise UsageError(
                    name,
                    expected="1 or more",
                    found=str(value),
                    remedy="Raise it, or leave it out.",
                )
        self.pool, self.capabilities = pool, capabilities
        self.max_tokens_per_step = max_tokens_per_step
        self.max_prefill_tokens = max(max_tokens_per_step, max_prefill_tokens)
        self.max_running = min(max_num_seqs, capabilities.max_slots or max_num_seqs)
        if capabilities.mixes:  # so that one step can hold a token of every running sequence
            self.max_running = min(self.max_running, max_tokens_per_step)
        # An executor that does not mix computes a prompt whole.
        self.reuses = pool.caches and capabilities.mixes
        self.waiting: list[Sequence] = []
        self._crowded = False
        self.running: list[Sequence] = []
        self.num_preemptions = self.num_drops = 0
        self.num_guests = 0  # whose pages nobody here holds, and who will let go of them
        self.clock, self.buckets = clock, buckets
        self.going: Decodes | None = None
        self._timed: list[Request] = []  # those with a deadline, the earliest first

    def add(self, request: Request) -> None:
        """Queues a request's first sequence."""
        insort(self.waiting, request.sequences[0], key=_rank)
        if request.deadline < math.inf:
            self._timed = [one for one in self._timed if not one.finished]
            insort(self._timed, request, key=_deadline)

    def schedule(self) -> Plan:
        """The next step; takes the pages that it needs. Empty only if there is nothing to do, or
        guests hold the pages.

        Raises:
            CapacityError: the oldest sequence does not fit though nothing else runs.
        """
        self._halt()
        if self._timed:
            self._expire()
        while self._gives_way():
            self.preempt(self.running[-1])
        while True:
            plan = Plan()
            if self.capabilities.mixes:
                self._plan_mixed(plan)
            else:
                self._plan_split(plan)
            if plan.beside or not (self.waiting or self.running):
                return plan
            if not self.running and self.num_guests:
                return plan
            if not self.running:
                raise CapacityError(
                    "the KV pool",
                    expected=f"room for a sequence of {len(self.waiting[0].tokens)} tokens",
                    found=f"{self.pool.num_available} free pages of {self.pool.page_size} tokens",
                    remedy="Give the pool more memory (memory_fraction), or send shorter prompts.",
                )
            self.preempt(self.running[-1])  # all wait for pages that the others hold

    def schedule_ahead(self) -> Plan | None:
        """The step behind the one in flight, of whose tokens nothing is known: one more token of
        each sequence that goes on whatever it samples, first, and prompts as in any step, if the
        executor samples in such steps. Takes the pages that it needs.

        Returns:
            None where the next step has to wait for the one in flight: a place is about to come
            free for one that waits, a row needs the host to sample it, pages are short, or all end.
        """
        if self._timed:
            self._expire()
        if self.waiting and self._gives_way():
            return None
        decodes, ends = self.going, False
        rest: list[Sequence] = []
        if decodes is None or decodes.left < 0:
            found = self._survey()
            if found is None:
                return None
            decodes, rest, ends = found
        elif not all(map(_goes_on, decodes.wary)):
            return None
        admits = bool(self.waiting) and self._admits()
        if self.waiting and ends and not admits:
            return None
        mixes = admits or bool(rest)
        if mixes:
            beside = [*self.running, self.waiting[0]] if admits else self.running
            if not self.capabilities.samples_mixed or not all(map(samples_anywhere, beside)):
                return None
        plan = Plan()
        if not self._take_each(plan, decodes, [seq for seq in rest if seq.remaining == 1]):
            return None
        if mixes:
            self._plan_prompts(plan, ahead=True)
        return plan if plan.decodes is not None or plan.beside else None

    def _survey(self) -> tuple[Decodes | None, list[Sequence], bool] | None:
        """Of those that run who goes on whatever the step in flight samples, of whom nothing is in
        flight, and whether any is full then; None if one has to wait.
        """
        going: list[Sequence] = []
        rest: list[Sequence] = []
        ends = False
        for seq in self.running:
            if not seq.in_flight:
                rest.append(seq)
            elif not _goes_on(seq):
                return None
            elif seq.num_computed + 1 < seq.limit:
                going.append(seq)
            else:
                ends = True
        self._halt()
        decodes = Decodes(going) if going else None
        self.going = None if rest or ends else decodes
        return decodes, rest, ends

    def fork(self, request: Request) -> list[PageCopy]:
        """Starts the unfinished siblings of a first sequence whose prompt is computed.

        Those that find no place wait, and compute the prompt again.

        Returns:
            the page copies to make at once.
        """
        self._halt()
        request.forked = True
        first, *others = request.sequences
        copies: list[PageCopy] = []
        for seq in others:
            if seq.finish_reason is not None:
                continue
            seq.num_reached = first.num_computed
            # Were it computed again, then at most this much would not be this sequence's own work.
            seq.num_cached = first.num_computed
            fits = self.pool.fork_pages_needed(first.id) <= self.pool.num_available
            if fits and len(self.running) < self.max_running:
                copies += self.pool.fork(first.id, seq.id)
                seq.num_computed = first.num_computed
                insort(self.running, seq, key=_rank)
            else:
                insort(self.waiting, seq, key=_rank)
        return copies

    def preempt(self, seq: Sequence, *, keep: bool = True) -> None:
        """Takes a running sequence's pages away and queues it to be computed anew.

        `keep` as in `drop`.
        """
        self.drop(seq, keep=keep)
        seq.num_computed = 0
        insort(self.waiting, seq, key=_rank)
        self.num_preemptions += 1
        seq.timings.preemptions += 1

    def share(self, seq: Sequence) -> None:
        """Lets later sequences start with what a running one has computed, in full pages."""
        self._keep(seq, closing=False)

    def drop(self, seq: Sequence, *, keep: bool = True) -> None:
        """Forgets a sequence, wherever it is, and frees its pages.

        A step in flight may still write into them: before all that a later step writes there.

        Args:
            seq: waiting, running or neither.
            keep: whether full pages of what it has computed go to the prefix cache. Not to be
                when a step or a page copy may not have been run as planned.
        """
        if seq in self.running:
            if keep:
                self._keep(seq, closing=True)
            self.running.remove(seq)
            self._halt()
            self.num_drops += 1
        elif seq in self.waiting:
            self.waiting.remove(seq)
        seq.in_flight = 0
        self.pool.free(seq.id)

    def _keep(self, seq: Sequence, *, closing: bool) -> None:
        """What is in flight may not be written yet, and is of tokens that nobody knows."""
        if not self.reuses:
            return
        namespace, params = seq.request.namespace, seq.request.params
        written = seq.num_computed - seq.in_flight
        self.pool.keep(seq.id, seq.tokens[:written], namespace, closing=closing)
        if params.cache_ttl is not None and written >= len(seq.request.prompt):
            self.pool.pin(seq.request.prompt, namespace, params.cache_ttl)

    def _halt(self) -> None:
        """Those that run are others from now on, or go another way."""
        if self.going is not None:
            self.going.end_lag()
            self.going = None

    def _expire(self) -> None:
        """Ends the requests whose time is over."""
        now = self.clock()
        while self._timed and self._timed[0].deadline <= now:
            for seq in self._timed.pop(0).sequences:
                if seq.finish_reason is None:
                    seq.expire()
                    self.drop(seq)

    def _gives_way(self) -> bool:
        """Whether the last of the running has to make room for one of a higher priority."""
        if not self.waiting or not self.running:
            return False
        first, last = self.waiting[0].request.params, self.running[-1].request.params
        return first.priority < last.priority and not self._admits()

    def _plan_mixed(self, plan: Plan) -> None:
        self._plan_decode(plan)
        self._plan_prompts(plan)

    def _plan_prompts(self, plan: Plan, *, ahead: bool = False) -> None:
        """Prompts beside the tokens that are planned, of those that run and of those that wait;
        ahead of a step in flight only of those that may be sampled there.
        """
        decoding = plan.num_sequences
        self._crowded = self._crowded or len(self.waiting) >= CROWD
        if self._crowded:
            budget = self.max_prefill_tokens + -decoding % ROWS
        else:
            budget = self.max_tokens_per_step if decoding else self.max_prefill_tokens
            budget -= decoding
        for seq in self.running:
            count = self._chunk(seq, budget) if seq.remaining > 1 else 0
            if count and self._has_pages(seq, count):
                self._take(plan, seq, count)
                budget -= count
        # Of all that run once: what these need does not change as others are let in. Where they
        # slide it does: pages that they would let go of may be held by others then.
        knows = not self.pool.slides and bool(budget) and self._has_place()
        wanted = self._pages_ahead(self.running) if knows else None
        while budget and self._admits(wanted=wanted):
            if ahead and not samples_anywhere(self.waiting[0]):
                break
            seq = self._admit(plan)
            count = self._chunk(seq, budget)
            self._take(plan, seq, count)
            if wanted is not None:
                wanted += self._pages_ahead([seq])
            budget -= count
        self._crowded = self._crowded and bool(self.waiting)

    def _chunk(self, seq: Sequence, budget: int) -> int:
        """How many of a sequence's tokens a step takes, of those that it has a budget for."""
        limit = SCORED_TOKENS if seq.request.scoring else budget
        return min(seq.remaining, budget, limit, self.pool.max_append)

    def _plan_split(self, plan: Plan) -> None:
        if not self._admits():
            self._plan_decode(plan)
            return
        for seq in (self.waiting[0], *self._companions()):
            if self._admits(seq):
                self._take(plan, self._admit(plan, seq), seq.remaining)

    def _companions(self) -> list[Sequence]:
        """Who is computed together with the first that waits, as far as there is room."""
        places = min(self.capabilities.prefills, self.max_running - len(self.running))
        if self.buckets is None or places < 2:
            return []
        return self.buckets.companions(self.waiting, places, self.max_prefill_tokens)

    def _plan_decode(self, plan: Plan) -> None:
        """One token of each running sequence that is ready for it, the last in rank giving way.

        By rank, so that whoever is preempted has not been planned yet in this step.
        """
        if self._take_each(plan, None, [seq for seq in self.running if seq.remaining <= 1]):
            return
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            index += 1
            if seq.remaining > 1:
                continue
            while not self._has_pages(seq, 1):
                last = self.running[-1]
                self.preempt(last)
                if last is seq:
                    return
            self._take(plan, seq, 1)

    def _take_each(self, plan: Plan, decodes: Decodes | None, seqs: list[Sequence]) -> bool:
        """One token of each of those that decode, and of some more; False, and nothing has been
        taken, if pages are short.
        """
        if decodes is None and not seqs:
            return True
        ids = () if decodes is None else decodes.ids
        found = self.pool.extend((*ids, *[seq.id for seq in seqs]) if seqs else ids)
        if found is None:
            return False
        slots, copies, opened = found
        if decodes is not None and not seqs:
            plan.decode(decodes, slots)
            plan.copies, plan.opened = copies, opened
            return True
        if decodes is not None:
            plan.decode(decodes, slots[: len(ids)])
        each = zip(seqs, slots[len(ids) :].tolist(), strict=True)
        plan.beside += [Chunk(seq, seq.num_computed, [slot]) for seq, slot in each]
        plan.copies += copies
        return True

    def _has_pages(self, seq: Sequence, count: int) -> bool:
        return self.pool.pages_needed(seq.id, count) <= self.pool.num_available

    def _take(self, plan: Plan, seq: Sequence, count: int) -> None:
        # What a prompt is about to let go of, others may still begin with.
        if count > 1 and self.pool.drops(seq.id, count):
            self._keep(seq, closing=False)
        slots, copies = self.pool.append(seq.id, count)
        plan.beside.append(Chunk(seq, seq.num_computed, slots))
        plan.copies += copies

    def _admits(self, seq: Sequence | None = None, wanted: int | None = None) -> bool:
        """Whether a waiting sequence, by default the first, can run to its next token beside the
        running ones, which want so many pages for theirs, if that is known.
        """
        if not self._has_place():
            return False
        pool, first = self.pool, seq or self.waiting[0]
        room = pool.num_available - (self._pages_ahead(self.running) if wanted is None else wanted)
        if pool.most_pages(len(first.tokens)) <= room:
            return True
        if room < 1 or not self.reuses or first.request.scoring:
            return False
        return pool.pages_to_open(first.tokens, first.request.namespace) <= room

    def _has_place(self) -> bool:
        return bool(self.waiting) and len(self.running) < self.max_running

    def _pages_ahead(self, seqs: list[Sequence]) -> int:
        """Pages for the rest of their prompts, or their next tokens."""
        pool, total = self.pool, 0
        for seq in seqs:
            ahead = max(1, len(seq.tokens) - pool.length(seq.id))
            total += pool.pages_needed(seq.id, ahead)
        return total

    def _admit(self, plan: Plan, seq: Sequence | None = None) -> Sequence:
        self._halt()
        seq = seq or self.waiting[0]
        self.waiting.remove(seq)
        if self.reuses:
            tokens, request = seq.tokens, seq.request
            if request.scoring and request.prompt_logprobs is not None:
                # What is cached has no logits, and the row before a token tells its logprob.
                tokens = tokens[: len(request.prompt_logprobs)]
            cached, copies = self.pool.reuse(seq.id, tokens, request.namespace)
            plan.copies += copies
            seq.start_at(cached)
            if not seq.looked_up:
                self.pool.prefix_counters.look_up(len(seq.request.prompt), seq.num_cached)
            seq.looked_up = True
        else:
            self.pool.add(seq.id)
        insort(self.running, seq, key=_rank)
        return seq


def _goes_on(seq: Sequence) -> bool:
    """Whether a sequence's next token is on its way and nothing else, and a step can sample the one
    behind it on the device.
    """
    if seq.in_flight != 1 or seq.num_computed != len(seq.tokens):
        return False
    return seq.sampling.always_in_step or seq.sampling.samples_in_step


def samples_anywhere(seq: Sequence) -> bool:
    """Whether a step of any kind may sample what comes behind a chunk of it on the device."""
    request = seq.request
    return seq.sampling.always_in_step and request.forked and not request.scoring

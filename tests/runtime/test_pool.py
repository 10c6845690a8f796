"""The pools against a model that knows only what each sequence should read back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tilewright.errors import CapacityError, UsageError
from tilewright.runtime import PagedPool, SlotPool

foreseen: list[int] = []  # of steps whose pages were known before, how many were opened


class PoolMachine(RuleBasedStateMachine):
    """Random appends, forks and frees over a memory of numbers."""

    @initialize(num_pages=st.integers(2, 12), page_size=st.integers(1, 5))
    def start(self, num_pages, page_size):
        self.pool = self.make(num_pages, page_size)
        self.full = self.pool.num_free
        self.memory = {}  # slot -> value
        self.expected = {}  # sequence -> values
        self.next_id = self.next_value = 0
        self.last = ()  # who was extended

    def make(self, num_pages, page_size):
        return PagedPool(num_pages, page_size)

    def copy(self, copies):
        size = self.pool.page_size
        for source, destination in copies:
            for offset in range(size):
                self.memory[destination * size + offset] = self.memory.get(source * size + offset)

    @rule()
    def add(self):
        self.pool.add(self.next_id)
        self.expected[self.next_id] = []
        self.next_id += 1

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), count=st.integers(0, 12))
    def append(self, data, count):
        seq = data.draw(st.sampled_from(sorted(self.expected)))
        before, needed = self.pool.num_free, self.pool.pages_needed(seq, count)
        too_long = not self.pool.shares and len(self.expected[seq]) + count > self.pool.page_size
        if needed > before or too_long:
            with pytest.raises(CapacityError):
                self.pool.append(seq, count)
            assert self.pool.num_free == before
            return
        slots, copies = self.pool.append(seq, count)
        assert len(slots) == count
        assert self.pool.num_free == before - needed
        self.copy(copies)
        for slot in slots:
            self.memory[slot] = self.next_value
            self.expected[seq].append(self.next_value)
            self.next_value += 1

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def extend(self, data):
        growing = [
            seq
            for seq in sorted(self.expected)
            if self.pool.shares or len(self.expected[seq]) < self.pool.page_size
        ]
        seqs = data.draw(st.lists(st.sampled_from(growing), unique=True)) if growing else []
        if self.last and set(self.last) <= set(growing) and data.draw(st.booleans()):
            seqs = self.last  # of a tuple the same one, whose rows the pool may remember
        self.last = tuple(seqs)
        for _ in range(
            data.draw(st.integers(1, 6))
        ):  # the very tuple, from the third time foreseen
            longest = max([len(self.expected[seq]) for seq in self.last], default=0)
            if self.pool.shares or longest < self.pool.page_size:
                self.extend_each(self.last)

    def extend_each(self, seqs):
        before = self.pool.num_free
        needed = sum(self.pool.pages_needed(seq, 1) for seq in seqs)
        lengths = [self.pool.length(seq) for seq in seqs]
        found = self.pool.extend(seqs)
        if needed > before:
            assert found is None and self.pool.num_free == before
            assert [self.pool.length(seq) for seq in seqs] == lengths
            return
        slots, copies, opened = found
        if opened is not None:
            tables = np.zeros((len(seqs), 99), dtype=np.int32)
            opened.write(tables)
            size = self.pool.page_size
            ends = [
                (row, length // size) for row, length in enumerate(lengths) if not length % size
            ]
            assert [*zip(*tables.nonzero(), strict=True)] == ends
            pages = [
                slot // size
                for slot, length in zip(slots, lengths, strict=True)
                if not length % size
            ]
            assert tables[tables > 0].tolist() == pages
            foreseen.append(len(pages))
        # Of several that share a page, the last to write keeps it.
        assert before - needed <= self.pool.num_free <= before
        self.copy(copies)
        for seq, slot in zip(seqs, slots, strict=True):
            self.memory[slot] = self.next_value
            self.expected[seq].append(self.next_value)
            self.next_value += 1

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def fork(self, data):
        seq = data.draw(st.sampled_from(sorted(self.expected)))
        new, before = self.next_id, self.pool.num_free
        needed = self.pool.fork_pages_needed(seq)
        if needed > before:
            with pytest.raises(CapacityError):
                self.pool.fork(seq, new)
        else:
            self.copy(self.pool.fork(seq, new))
            self.expected[new] = list(self.expected[seq])
            self.next_id += 1
        assert self.pool.num_free == before - (needed if needed <= before else 0)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def free(self, data):
        seq = data.draw(st.sampled_from(sorted(self.expected)))
        self.pool.free(seq)
        self.pool.free(seq)  # a second time does nothing
        del self.expected[seq]

    def tables(self):
        seqs = sorted(self.expected)
        if not seqs:
            return {}
        size = self.pool.page_size
        rows = self.pool.block_tables(seqs).tolist()
        return {
            seq: row[: -(-len(self.expected[seq]) // size)]
            for seq, row in zip(seqs, rows, strict=True)
        }

    @invariant()
    def every_sequence_reads_its_own_values(self):
        size = self.pool.page_size
        for seq, pages in self.tables().items():
            values = [
                self.memory.get(pages[i // size] * size + i % size)
                for i in range(len(self.expected[seq]))
            ]
            assert values == self.expected[seq]
            assert self.pool.length(seq) == len(values)

    @invariant()
    def no_page_leaks(self):
        owned = {page for pages in self.tables().values() for page in pages}
        assert self.pool.num_free + len(owned) == self.full
        assert not self.pool.shares or 0 not in owned
        assert 0 <= self.pool.waste() < 1

    @invariant()
    def pages_are_shared_only_by_equal_prefixes(self):
        size, holders = self.pool.page_size, {}
        for seq, pages in self.tables().items():
            assert len(set(pages)) == len(pages)
            for index, page in enumerate(pages):
                holders.setdefault(page, []).append((index, seq))
        for page_holders in holders.values():
            assert self.pool.shares or len(page_holders) == 1
            assert len({index for index, _ in page_holders}) == 1
            index = page_holders[0][0]
            values = [self.expected[seq][index * size :][:size] for _, seq in page_holders]
            longest = max(values, key=len)
            assert all(longest[: len(one)] == one for one in values)

    def teardown(self):
        for seq in self.expected:
            self.pool.free(seq)
        assert self.pool.num_free == self.full
        assert self.pool.waste() == 0


class SlotMachine(PoolMachine):
    def make(self, num_pages, page_size):
        return SlotPool(num_pages, page_size)


TestPagedPool = PoolMachine.TestCase
TestSlotPool = SlotMachine.TestCase
TestPagedPool.settings = TestSlotPool.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)


def test_places_were_foreseen_and_pages_opened_there():
    """By the schedules above."""
    assert 0 in foreseen and max(foreseen) > 1 and len(foreseen) > 50


@pytest.mark.quick
def test_a_write_into_a_shared_page_forks_that_page_alone():
    pool = PagedPool(10, 4)
    pool.add(1)
    pool.append(1, 6)
    assert pool.fork(1, 2) == []
    assert pool.num_free == 7
    first, last = pool.block_tables([1])[0].tolist()
    slots, copies = pool.append(2, 1)
    assert copies == [(last, copies[0][1])]
    assert slots == [copies[0][1] * 4 + 2]
    assert pool.block_tables([2]).tolist() == [[first, copies[0][1]]]
    assert pool.append(1, 1) == ([last * 4 + 2], [])  # nobody else holds it now


def test_a_full_shared_page_is_not_copied():
    pool = PagedPool(10, 4)
    pool.add(1)
    pool.append(1, 4)
    pool.fork(1, 2)
    assert pool.append(2, 1)[1] == []


def test_block_tables_are_padded_with_the_reserved_page():
    pool = PagedPool(40, 2)
    pool.add(1)
    pool.append(1, 50)
    pool.add(2)
    pool.append(2, 3)
    tables = pool.block_tables([2, 1])
    assert tables.shape == (2, 25)
    assert tables[0, 2:].tolist() == [0] * 23
    assert (tables[1] > 0).all()


def test_many_sequences_grow_the_tables():
    pool = PagedPool(200, 1)
    for seq in range(50):
        pool.add(seq)
        pool.append(seq, 3)
    pages = pool.block_tables(list(range(50))).flatten().tolist()
    assert sorted(pages) == list(range(1, 151))


@pytest.mark.quick
def test_waste_is_under_four_percent_at_mixed_lengths():
    pool = PagedPool(2000, 16)
    for seq, length in enumerate(range(100, 1000, 37)):
        pool.add(seq)
        pool.append(seq, length)
    assert 0 < pool.waste() < 0.04
    slots = SlotPool(30, 1024)
    for seq, length in enumerate(range(100, 1000, 37)):
        slots.add(seq)
        slots.append(seq, length)
    assert slots.waste() > 0.4  # what paging saves


@pytest.mark.parametrize("make", [lambda: PagedPool(1, 4), lambda: PagedPool(5, 0)])
def test_impossible_pools_are_refused(make):
    with pytest.raises(UsageError, match="PagedPool"):
        make()


def test_an_overlong_sequence_is_refused_by_its_slot():
    pool = SlotPool(1, 4)
    pool.add(1)
    with pytest.raises(CapacityError, match="max_model_len"):
        pool.append(1, 5)
    slots, copies = pool.append(1, 4)
    assert (list(slots), copies) == ([0, 1, 2, 3], [])

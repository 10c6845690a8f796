"""Steps of the same rows: their places, and block tables brought up to date by patches, against the
pool's books, which are looked at now and then.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.runtime import PagedPool
from tilewright.runtime import batch as module
from tilewright.runtime.batch import DecodeBatches
from tilewright.runtime.block_tables import TablePatch
from tilewright.runtime.decodes import Decodes
from tilewright.runtime.params import SamplingParams
from tilewright.runtime.plan import Plan
from tilewright.runtime.request import Request

WIDE = 64


def started(lengths, pool):
    """Sequences in the pool, each with so many tokens computed and the next one in flight."""
    seqs = []
    for length in lengths:
        request = Request([1] * length, SamplingParams(max_new_tokens=99), frozenset(), 99, None)
        (seq,) = request.sequences
        pool.add(seq.id)
        pool.append(seq.id, length)
        seq.num_computed, seq.in_flight = length, 1
        seqs.append(seq)
    return seqs


def next_plan(pool, decodes):
    slots, copies, opened = pool.extend(decodes.ids)
    plan = Plan(copies=copies, opened=opened)
    plan.decode(decodes, slots)
    return plan


@pytest.mark.quick
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    size=st.integers(1, 4),
    turns=st.lists(st.integers(0, 2), min_size=30, max_size=50),
    looks=st.sets(st.integers(0, 49), max_size=4),
)
def test_tables_are_the_pools_whoever_missed_some_steps(lengths, size, turns, looks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PATCHES", 7)
        patch.setattr("tilewright.runtime.going_on._FAR", 11)
        pool = PagedPool(600, size)
        seqs = started(lengths, pool)
        decodes, batches = Decodes(seqs), DecodeBatches(pool)
        tables = [np.full((len(seqs), WIDE), -1, dtype=np.int32) for _ in range(3)]
        versions = [-1] * 3
        for step, turn in enumerate(turns):
            plan = next_plan(pool, decodes)
            found = batches.build(plan, None)
            found.bring(tables[turn], versions[turn])
            versions[turn] = found.tables_version
            total = [length + step + 1 for length in lengths]
            slots = tables[turn][range(len(seqs)), (np.array(total) - 1) // size] * size
            assert (slots + (np.array(total) - 1) % size == plan.slots).all()
            if step in looks or step == len(turns) - 1:
                assert [pool.length(seq.id) for seq in seqs] == total
                whole = pool.block_tables(decodes.ids).numpy()
                assert (tables[turn][:, : whole.shape[1]] == whole).all()
                assert not tables[turn][:, whole.shape[1] :].any()
                for row, seq in enumerate(seqs):
                    pages = -(-total[row] // size)
                    assert pool._held[seq.id] == whole[row, :pages].tolist()
        for seq in seqs:
            pool.free(seq.id)
        assert pool.num_free == 599


def test_tables_are_gathered_once_while_the_rows_are_the_same(monkeypatch):
    pool = PagedPool(600, 2)
    seqs = started([3, 8], pool)
    decodes, batches = Decodes(seqs), DecodeBatches(pool)
    gathered = []
    gather = batches._gather
    monkeypatch.setattr(batches, "_gather", lambda key: (gathered.append(key), gather(key)))
    for _ in range(2 * module._PATCHES + 9):
        widest = batches.build(next_plan(pool, decodes), None).tables.shape[1]
    assert gathered == [decodes.ids] and widest > 30
    assert len(batches._patches) <= module._PATCHES + 1


def test_a_patch_is_not_written_to_a_copy():
    one = np.array([0])
    with pytest.raises(AssertionError):
        TablePatch(one, one, one, 1).write(np.zeros((2, 4), dtype=np.int32)[:, :2])

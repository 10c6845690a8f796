"""The metadata of a step in one buffer: what goes in comes out, padding harms nobody."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.program import Call, Program
from tilewright.runtime.decode_graphs import bucket_of, is_decode, obstacles
from tilewright.runtime.step import Step
from tilewright.runtime.step_buffer import FEED, FIELDS, SAMPLING, Layout, StepBuffer, StepShape

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")


def step_of(counts: list[int], pages: int, rows: int) -> Step:
    """A step of sequences with so many tokens each."""
    total = sum(counts)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    draw = torch.Generator().manual_seed(total)
    return Step(
        token_ids=torch.randint(1, 99, (total,), generator=draw),
        positions=torch.randint(1, 99, (total,), generator=draw),
        query_start=starts,
        seq_lens=torch.randint(1, 99, (len(counts),), generator=draw).int(),
        slot_mapping=torch.randint(1, 99, (total,), generator=draw),
        block_tables=torch.randint(1, 99, (len(counts), pages), generator=draw).int(),
        logits_indices=torch.randint(0, total, (rows,), generator=draw),
    )


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 7), st.integers(0, 3))
def test_a_step_goes_through_unchanged_at_its_own_shape(counts, pages, rows) -> None:
    step = step_of(counts, pages, rows)
    shape = StepShape.of(step)
    buffer = StepBuffer(shape, CPU)
    buffer.fill(step)
    for name, found in buffer.views.items():
        assert found.dtype is FIELDS[name] and torch.equal(found, getattr(step, name)), name


@given(st.integers(1, 6), st.integers(1, 4))
def test_padding_has_no_tokens_and_writes_to_the_reserved_page(count: int, pages: int) -> None:
    step, bucket = step_of([1] * count, pages, count), 8
    shape = StepShape(bucket, bucket, 5, bucket)
    buffer = StepBuffer(shape, CPU)
    buffer.host.fill_(255)  # what an earlier step left there
    buffer.fill(step)
    padded = buffer.views
    assert padded["query_start"].tolist() == [*range(count + 1), *[count] * (bucket - count)]
    for name in ("token_ids", "positions", "slot_mapping", "seq_lens", "logits_indices"):
        own = getattr(step, name)
        assert torch.equal(padded[name][:count], own) and not padded[name][count:].any()
    assert torch.equal(padded["block_tables"][:count, :pages], step.block_tables)
    assert padded["block_tables"].sum() == step.block_tables.sum()


def test_a_layout_has_every_field_once_aligned_and_in_one_order() -> None:
    layout = Layout.of(StepShape(4, 4, 3, 4), (*FIELDS, *SAMPLING, *FEED))
    assert set(layout.places) == {*FIELDS, *SAMPLING, *FEED}
    places = list(layout.places.values())
    assert all(start % 16 == 0 for start, *_ in places)
    assert all(one[1] <= two[0] for one, two in zip(places, places[1:], strict=False))
    assert places[-1][1] <= layout.nbytes
    # What is not copied at every step is at the ends.
    assert [*layout.places][0] == "token_ids" and [*layout.places][-1] == "block_tables"
    assert [*Layout.of(StepShape(4, 4, 3, 4), ("seq_lens", "positions")).places] == [
        "positions",
        "seq_lens",
    ]


def test_buckets_hold_every_count() -> None:
    assert [bucket_of(n) for n in (1, 2, 3, 5, 8, 9, 17, 128)] == [1, 2, 4, 8, 8, 16, 24, 128]
    assert all(n <= bucket_of(n) < n + max(8, n) for n in range(1, 300))


def test_a_decode_step_brings_one_token_a_sequence_and_wants_all_logits() -> None:
    assert is_decode(step_of([1, 1, 1], 2, 3))
    assert not is_decode(step_of([1, 2], 2, 2)) and not is_decode(step_of([1, 1], 2, 1))


def test_ops_that_wait_for_the_device_stay_out_of_graphs() -> None:
    calls = tuple(
        Call(kernel, (), ())
        for kernel in ("eager/moe_experts", "eager/topk", "triton/generated/add-1", "eager/aten")
    )
    assert obstacles(Program("p", {}, (), {}, (), calls)) == ["aten", "moe_experts"]

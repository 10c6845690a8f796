"""How large the KV pool is made: what sequences can need, or what memory has room for."""

from __future__ import annotations

import pytest
import torch

from tilewright.codegen.eager.backend import BACKEND
from tilewright.errors import CapacityError
from tilewright.ir.parser import parse_graph
from tilewright.runtime.image import LMConfig
from tilewright.runtime.memory import captured_bytes, pool_pages, prefill_tokens, step_bytes
from tilewright.targets import Target

GB = 10**9
TEXT = """
def g(token_ids: i64[T], query_start: i32[B + 1], x: f32[T, 1024]):
    y: f32[T, 1024] = silu(x)
    z: f32[T, 1024] = exp(y)
    return {"logits": z}
"""
PROGRAM = BACKEND.lower(parse_graph(TEXT), Target.parse("cpu")).program
ATTENTION = """
def g(q: f32[B, 2, 4], kc: f32[N, P, 2, 4], vc: f32[N, P, 2, 4], tables: i32[B, M], lens: i32[B]):
    y: f32[B, 2, 4] = paged_attention(q, kc, vc, tables, lens, None, None, None, scale=0.5)
    return {"logits": y}
"""
ATTENDS_IN_TORCH = BACKEND.lower(parse_graph(ATTENTION), Target.parse("cpu")).program
PAGE_BYTES = 2_000_000
CUDA = torch.device("cuda")


def config(batch: int = 8, length: int = 1024, fraction: float = 0.9) -> LMConfig:
    return LMConfig(1000, length, batch, 16, "paged", (), fraction)


@pytest.fixture
def device(monkeypatch):
    """A device of 80 GB, of which some are in use, and torch holds some without using them."""

    def of(used: int, held: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (80 * GB - used - held, 80 * GB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: used + held)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: used)

    return of


def test_enough_memory_gives_every_sequence_its_pages(device) -> None:
    device(16 * GB)
    assert pool_pages(config(), PAGE_BYTES, (PROGRAM,), CUDA) == 8 * 64 + 1


def test_a_cpu_is_not_asked() -> None:
    assert pool_pages(config(), PAGE_BYTES, (PROGRAM,), torch.device("cpu")) == 8 * 64 + 1


def test_too_little_gives_what_fits(device) -> None:
    device(16 * GB)
    many = config(batch=4096)
    found = pool_pages(many, PAGE_BYTES, (PROGRAM,), CUDA)
    beside = step_bytes(PROGRAM, many)
    room = 0.9 * 80 * GB - 16 * GB - beside
    assert found < 4096 * 64 + 1
    assert 0 <= room - found * PAGE_BYTES < (512 << 20)


def test_what_torch_holds_without_using_it_counts_as_free(device) -> None:
    device(16 * GB)
    before = pool_pages(config(batch=4096), PAGE_BYTES, (PROGRAM,), CUDA)
    device(16 * GB, held=4 * GB)
    assert pool_pages(config(batch=4096), PAGE_BYTES, (PROGRAM,), CUDA) == before


def test_no_room_for_one_sequence_is_an_error_that_names_the_knobs(device) -> None:
    device(71 * GB)
    with pytest.raises(CapacityError) as caught:
        pool_pages(config(length=65536, fraction=0.9), PAGE_BYTES, (PROGRAM,), CUDA)
    text = str(caught.value)
    assert "room for one sequence of 65536 tokens: 8.19 GB" in text
    assert "71.00 GB in use" in text and "memory_fraction=0.9 of 80.00 GB" in text
    assert "raise memory_fraction to 1" in text and "max_model_len" in text
    device(79 * GB)
    with pytest.raises(CapacityError) as caught:
        pool_pages(config(length=65536), PAGE_BYTES, (PROGRAM,), CUDA)
    assert "raise memory_fraction" not in str(caught.value)


def test_a_step_takes_its_temporaries_and_logits() -> None:
    one = step_bytes(PROGRAM, config(batch=8))
    assert one >= 2048 * 1024 * 4  # y, while z is computed
    assert step_bytes(PROGRAM, config(batch=64)) - one >= 56 * 1000 * 6


def test_graphs_hold_a_step_of_their_own() -> None:
    assert captured_bytes(PROGRAM, config(), 4096) == step_bytes(PROGRAM, config(), 4096)
    assert captured_bytes(ATTENDS_IN_TORCH, config(), 4096) == 0  # no graph holds it


def test_steps_are_longer_where_memory_is_plenty(device, monkeypatch) -> None:
    device(16 * GB)
    assert prefill_tokens(PROGRAM, config(), CUDA) == 8192
    assert prefill_tokens(PROGRAM, config(batch=4), CUDA) == 4096  # all sequences at their longest
    assert prefill_tokens(PROGRAM, config(batch=1), CUDA) == 2048
    assert prefill_tokens(PROGRAM, config(), torch.device("cpu")) == 2048
    assert prefill_tokens(ATTENDS_IN_TORCH, config(), CUDA) == 2048
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (8 * GB, 24 * GB))
    assert prefill_tokens(PROGRAM, config(), CUDA) == 2048


def test_the_pool_leaves_room_for_longer_steps(device) -> None:
    device(16 * GB)
    many = config(batch=4096)
    short, long = (pool_pages(many, PAGE_BYTES, (PROGRAM,), CUDA, n) for n in (2048, 8192))
    more = step_bytes(PROGRAM, many, 8192) - step_bytes(PROGRAM, many, 4096)
    more += captured_bytes(PROGRAM, many, 8192) - captured_bytes(PROGRAM, many, 4096)
    assert more > 0 and abs((short - long) * PAGE_BYTES - more) <= PAGE_BYTES

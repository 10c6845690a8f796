"""Tensor maps that the host makes: what the driver is asked for, and what a launch takes."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from tilewright.codegen.triton import tensor_map
from tilewright.codegen.triton.tensor_map import BYTES, Mapped, aligned
from tilewright.errors import EngineError

pytestmark = pytest.mark.quick
Q = torch.zeros(5, 12, 64, dtype=torch.bfloat16)
MAPPED = Mapped(Q, 128, (5, 8, 64), (768, 64, 1), (16, 4, 64))


class Driver:
    """Stands for libcuda: answers with the statuses, then with 0, and fills maps with a number."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.asked: list[list[object]] = []

    def cuTensorMapEncodeTiled(self, where, *arguments) -> int:
        assert where.value % BYTES == 0
        plain = [list(a) if isinstance(a, ctypes.Array) else a.value for a in arguments]
        self.asked.append(plain)
        status = self.statuses.pop(0) if self.statuses else 0
        if not status:
            ctypes.memset(where, len(self.asked), BYTES)
        return status


@pytest.fixture
def driver(monkeypatch):
    def stands(*statuses: int) -> Driver:
        tensor_map._encoded.cache_clear()
        one = Driver(*statuses)
        monkeypatch.setattr(tensor_map, "_driver", lambda: one)
        return one

    yield stands
    tensor_map._encoded.cache_clear()


def entered() -> SimpleNamespace:
    found = SimpleNamespace(times=0)
    found.enter = lambda: setattr(found, "times", found.times + 1)
    return found


def test_the_fastest_dimension_comes_first_and_strides_are_bytes(driver) -> None:
    asked = driver().asked
    values = MAPPED.values(lambda: None)
    assert values == (bytes([1] * BYTES), 5, 8, 64, 768, 64, 1)
    address = Q.data_ptr() + 256
    assert asked == [
        [9, 3, address, [64, 8, 5], [128, 1536], [64, 4, 16], [1, 1, 1], 0, 3, 2, 0],
    ]


def test_a_map_is_made_once_for_a_place_and_a_shape(driver) -> None:
    asked = driver().asked
    shorter = Mapped(Q, 128, (4, 8, 64), (768, 64, 1), (16, 4, 64))
    made = [one.values(lambda: None)[0] for one in (MAPPED, MAPPED, shorter, MAPPED)]
    assert len(asked) == 2 and made[0] == made[1] == made[3] != made[2]


def test_a_thread_without_a_context_enters_it(driver) -> None:
    one, asked = entered(), driver(201).asked
    assert MAPPED.values(one.enter)[0] == bytes([2] * BYTES)
    assert one.times == 1 and len(asked) == 2


def test_what_the_driver_refuses_is_named(driver) -> None:
    driver(1)
    with pytest.raises(EngineError, match=r"map of \[5, 8, 64\] torch.bfloat16.*status 1"):
        MAPPED.values(lambda: None)
    assert MAPPED.values(lambda: None)[0] == bytes([2] * BYTES)  # a refusal is not kept


@pytest.mark.parametrize("count", [0, 1, 3])
def test_memory_of_maps_is_aligned_and_holds_them(count) -> None:
    memory, start = aligned(count)
    begin = start - ctypes.addressof(memory)
    assert start % BYTES == 0 and begin >= 0 and begin + count * BYTES <= len(memory)

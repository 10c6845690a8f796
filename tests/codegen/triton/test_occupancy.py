"""Occupancy against the rules of CUDA, worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.triton.aot import ARCHS
from tilewright.codegen.triton.occupancy import LIMITS, Occupancy, occupancy
from tilewright.codegen.triton.package import Resources
from tilewright.targets import TARGETS

pytestmark = pytest.mark.quick
GPUS = [target for target in TARGETS.values() if not target.is_cpu]


def held(name: str, registers: int, shared: int, threads: int) -> Occupancy:
    found = occupancy(Resources(registers, 0, 0, shared, threads), TARGETS[name])
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "registers", "shared", "threads", "blocks", "share", "limited_by"),
    [
        # 32 registers × 32 threads = 1024 a warp: 65536 / 1024 = 64 warps, all there can be.
        ("h100", 32, 0, 128, 16, 1.0, "warps"),
        ("l4", 32, 0, 128, 12, 1.0, "warps"),
        # 168 × 32 = 5376: a quarter of the registers, 16384, holds 3 warps; 12 in all.
        ("h100", 168, 0, 128, 3, 12 / 64, "registers"),
        # 96 × 32 = 3072: 5 warps a quarter, 20 in all, though the whole file would hold 21.
        ("a100", 96, 0, 32, 20, 20 / 64, "registers"),
        # 33 × 32 = 1056 is given out as 5 × 256 = 1280: 12 warps a quarter, 48 in all.
        ("h100", 33, 0, 128, 12, 48 / 64, "registers"),
        # Each block takes its 48 KiB and 1 KiB more: 228 // 49, 164 // 49, 100 // 49.
        ("h100", 32, 48 << 10, 128, 4, 16 / 64, "shared memory"),
        ("a100", 32, 48 << 10, 128, 3, 12 / 64, "shared memory"),
        ("rtx3090", 32, 48 << 10, 128, 2, 8 / 48, "shared memory"),
        # 1 byte is given out as 128: 228 KiB / 1152 B = 202 blocks, so the 16 by warps stay.
        ("h100", 32, 1, 128, 16, 1.0, "warps"),
        # One warp a block: the SM's count of blocks ends it.
        ("h100", 16, 0, 32, 32, 32 / 64, "blocks"),
        ("b200", 16, 0, 32, 32, 32 / 64, "blocks"),
        ("a10", 16, 0, 32, 16, 16 / 48, "blocks"),
        ("rtx4090", 16, 0, 32, 24, 24 / 48, "blocks"),
        ("rtx5090", 16, 0, 32, 24, 24 / 48, "blocks"),
        # 65 × 32 = 2080, given out as 2304, × 32 warps = 73728: more than there are.
        ("h100", 65, 0, 1024, 0, 0.0, "registers"),
        # A block of 5 warps spreads over the quarters as 8 would: 8 × 8192 just fits, once.
        ("h100", 255, 0, 160, 1, 5 / 64, "registers"),
        ("h100", 32, (227 << 10) + 1, 128, 0, 0.0, "shared memory"),
        ("h100", 32, 227 << 10, 128, 1, 4 / 64, "shared memory"),
    ],
)
def test_known_values(name, registers, shared, threads, blocks, share, limited_by):
    found = held(name, registers, shared, threads)
    assert (found.blocks, found.share, found.limited_by) == (blocks, share, limited_by)


def test_every_architecture_that_kernels_are_compiled_for_has_limits():
    assert set(LIMITS) == set(ARCHS) == {target.arch for target in GPUS}


def test_a_device_without_limits_has_no_occupancy():
    assert occupancy(Resources(32, 0, 0, 0, 128), TARGETS["cpu"]) is None


@given(
    st.sampled_from(GPUS),
    st.integers(0, 255),
    st.integers(0, 1 << 18),
    st.sampled_from([32, 64, 128, 256, 512, 1024]),
)
def test_what_is_resident_fits_and_one_more_does_not_once_less_is_taken(
    target, registers, shared, threads
):
    found = occupancy(Resources(registers, 0, 0, shared, threads), target)
    assert 0 <= found.share <= 1 and found.warps == found.blocks * threads // 32
    assert found.blocks * threads * registers <= target.registers_per_sm
    assert found.blocks * (shared + 1024) <= target.shared_memory_per_sm
    for less in (
        Resources(registers // 2, 0, 0, shared, threads),
        Resources(registers, 0, 0, 0, threads),
    ):
        assert occupancy(less, target).blocks >= found.blocks

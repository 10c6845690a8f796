"""How many blocks of a kernel one streaming multiprocessor holds at once, by the rules of CUDA.

Limits are those of "Technical Specifications per Compute Capability" in the CUDA C++ Programming
Guide. For 12.0 editions of it disagree on the blocks: we take the 24 of the later one, which the
toolkit's cuda_occupancy.h has too. That header also says how registers are given out: to each warp
in units of 256, from the quarter of the SM that the warp runs on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...targets import Target
from .package import Resources

WARP = 32  # threads
_QUARTERS = 4  # of an SM: each has a scheduler and a fourth of the registers
_REGISTER_UNIT = 256  # registers a warp is given at a time
_SHARED_UNIT = 128  # bytes of shared memory that a block is given at a time
_SHARED_RESERVED = 1 << 10  # bytes a block that the system keeps for itself, from 8.0 on


@dataclass(frozen=True, slots=True)
class Limits:
    """What one SM holds at most.

    Attributes:
        warps: resident warps.
        blocks: resident blocks.
    """

    warps: int
    blocks: int


LIMITS: Mapping[int, Limits] = {
    80: Limits(64, 32),
    86: Limits(48, 16),
    89: Limits(48, 24),
    90: Limits(64, 32),
    100: Limits(64, 32),
    120: Limits(48, 24),
}
"""By compute capability."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How full a kernel can make an SM.

    Attributes:
        blocks: resident at once; 0 for a kernel that the device cannot run.
        warps: in those blocks.
        most_warps: that the SM could hold.
        limited_by: what runs out first: "warps", "blocks", "registers" or "shared memory".
    """

    blocks: int
    warps: int
    most_warps: int
    limited_by: str

    @property
    def share(self) -> float:
        """Resident warps over those that the SM could hold, 0 to 1."""
        return self.warps / self.most_warps


def occupancy(resources: Resources, target: Target) -> Occupancy | None:
    """The occupancy that a kernel's resources allow; None for a device without limits on record.

    It is the theoretical one: a grid that is smaller, or blocks that end early, leave more idle.
    """
    limits = LIMITS.get(target.arch)
    if limits is None:
        return None
    warps = -(-resources.threads // WARP)
    room = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": _by_registers(resources.registers, warps, target),
        "shared memory": _by_shared(resources.shared, target),
    }
    limited_by = min(room, key=room.__getitem__)
    blocks = room[limited_by]
    return Occupancy(blocks, blocks * warps, limits.warps, limited_by)


def _by_registers(registers: int, warps: int, target: Target) -> int:
    a_warp = _up(max(registers, 1) * WARP, _REGISTER_UNIT)
    # A block starts only if its warps, spread over all quarters evenly, fit into an empty SM.
    if a_warp * _up(warps, _QUARTERS) > target.registers_per_sm:
        return 0
    warps_a_quarter = target.registers_per_sm // _QUARTERS // a_warp
    return warps_a_quarter * _QUARTERS // warps


def _by_shared(shared: int, target: Target) -> int:
    if shared > target.shared_memory_per_block:
        return 0
    return target.shared_memory_per_sm // _up(shared + _SHARED_RESERVED, _SHARED_UNIT)


def _up(count: int, unit: int) -> int:
    """``count`` rounded up to whole units."""
    return -(-count // unit) * unit

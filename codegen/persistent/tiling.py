"""How a persistent kernel is cut."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel is cut.

    Attributes:
        rows: of a chunk; a tile of a product has twice as many rows of the weight.
        num_warps: of a program; a chunk has 256 columns for each.
        ahead: chunks that are asked into L2 beyond the two that are in registers.
        splits: programs that share the keys of one KV head, a power of two.
        block_n: keys of a tile of attention.
        programs: of the launch; all are resident at once.
        batch: sequences of a step.
    """

    rows: int = 8
    num_warps: int = 8
    ahead: int = 4
    splits: int = 16
    block_n: int = 64
    programs: int = 132
    batch: int = 1

    @property
    def columns(self) -> int:
        """Of a chunk: a thread has 8 of each row."""
        return 256 * self.num_warps

"""Checkpoints of AutoAWQ in its GEMM layout: ``qweight``, ``qzeros``, ``scales``.

``qweight`` int32 [K, N / 8] and ``qzeros`` int32 [G, N / 8] hold eight columns a word, in the order
0 2 4 6 1 3 5 7 from the lowest bits on.
"""

from __future__ import annotations

import torch

from ..stored_codes import StoredCodes
from ..weight_packed import WORD
from ..weights import Weight, apply_weight
from .base import Layout, Stem, group_count, one_of, size_of, transposed, unpacked

_BITS = 4
_PER_WORD = WORD // _BITS


class Awq(Layout):
    """Weights of 4 bits with zero points by groups of columns; activations stay as they are."""

    parts = ("qweight", "qzeros", "scales")

    def read(self, stem: Stem) -> StoredCodes:
        """See Layout."""
        bits = self.settings.get("bits", self.settings.get("w_bit"))
        one_of(self.opened, "bits", bits, (_BITS,))
        form = str(self.settings.get("version") or self.settings.get("format") or "gemm").lower()
        one_of(self.opened, "version", form, ("gemm",))
        packed = stem.part("qweight", (torch.int32,))
        width, count = packed.shape[0], packed.shape[1] * _PER_WORD
        size = self.settings.get("group_size", self.settings.get("q_group_size", -1))
        group = size_of(self.opened, "group_size", size)
        groups = group_count(width, group)
        scale = transposed(stem.scale("scales", (groups, count)))
        zeros = stem.part("qzeros", (torch.int32,), (groups, packed.shape[1]))
        return StoredCodes(_in_order(packed), scale, _in_order(zeros), group=group)


def _in_order(packed: Weight) -> Weight:
    """int32 [R, N / 8] -> uint8 [N, R]: of the eight in a word, the even columns lie first."""
    rows, words = packed.shape
    codes = unpacked(packed, _BITS, 1)
    halves = apply_weight("reshape", (codes,), shape=(rows, words, 2, _PER_WORD // 2))
    pairs = apply_weight("permute", (halves,), dims=(0, 1, 3, 2))
    return transposed(apply_weight("reshape", (pairs,), shape=(rows, words * _PER_WORD)))

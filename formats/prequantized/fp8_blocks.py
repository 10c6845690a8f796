"""Checkpoints in e4m3 by blocks, as DeepSeek-V3 has them: ``weight`` and ``weight_scale_inv``."""

from __future__ import annotations

import torch

from ..stored_codes import StoredCodes
from .base import Layout, Stem, block_of, group_count, one_of


class Fp8Blocks(Layout):
    """Weights by blocks of columns and rows; activations rounded by groups as wide as a block."""

    parts = ("weight_scale_inv",)

    def read(self, stem: Stem) -> StoredCodes:
        """See Layout."""
        size = self.settings.get("weight_block_size") or (128, 128)
        rows, group = block_of(self.opened, "weight_block_size", size)
        scheme = self.settings.get("activation_scheme")
        one_of(self.opened, "activation_scheme", scheme, ("dynamic", None))
        codes = stem.part("weight", (torch.float8_e4m3fn,))
        count, width = codes.shape
        blocks = (group_count(count, rows), group_count(width, group))
        scale = stem.scale("weight_scale_inv", blocks)
        rounds = torch.float8_e4m3fn if torch.float8_e4m3fn in self.opened.computes else None
        if rounds is None:
            self.opened.note("activations stay as they are: the device has no products in e4m3")
        return StoredCodes(codes, scale, None, rows, group, None, rounds, group if rounds else 0)

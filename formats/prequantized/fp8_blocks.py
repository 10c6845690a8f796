"""Checkpoints in e4m3 by blocks, as DeepSeek-V3 has them: ``weight`` and ``weight_scale_inv``."""

from __future__ import annotations

from typing import cast

import torch

from ..stored_codes import StoredCodes
from .base import Layout, Stem, group_count


class Fp8Blocks(Layout):
    """Weights by blocks of columns and rows; activations rounded by groups as wide as a block."""

    parts = ("weight_scale_inv",)

    def read(self, stem: Stem) -> StoredCodes:
        """See Layout."""
        rows, group = cast(tuple[int, int], self.settings.get("weight_block_size") or (128, 128))
        self.setting("activation_scheme", "dynamic", None)
        codes = stem.part("weight", (torch.float8_e4m3fn,))
        count, width = codes.shape
        blocks = (group_count(count, rows), group_count(width, group))
        scale = stem.scale("weight_scale_inv", blocks)
        rounds = torch.float8_e4m3fn if torch.float8_e4m3fn in self.opened.computes else None
        if rounds is None:
            self.opened.note("activations stay as they are: the device has no products in e4m3")
        return StoredCodes(codes, scale, None, rows, group, None, rounds, group if rounds else 0)

"""Checkpoints of AutoGPTQ and GPTQModel: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

``qweight`` int32 [K bits / 32, N] holds the codes of a column below each other, the lowest bits
first; ``qzeros`` int32 [G, N bits / 32] those of a row beside each other, one less than they are
in the first version of the format (``checkpoint_format`` "gptq").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import torch

from ..stored_codes import StoredCodes
from ..weight_packed import WORD
from ..weights import Weight
from .base import Layout, Stem, group_count, one_of, signed, size_of, table, transposed, unpacked


class Gptq(Layout):
    """Weights of 4 or 8 bits by groups of columns; activations stay as they are."""

    parts = ("qweight", "qzeros", "scales", "g_idx")

    def read(self, stem: Stem) -> StoredCodes:
        """See Layout."""
        settings = self._settings_of(stem.name)
        bits = cast(int, one_of(self.opened, "bits", settings.get("bits"), (4, 8)))
        form = settings.get("checkpoint_format") or "gptq"
        one_of(self.opened, "checkpoint_format", form, ("gptq", "gptq_v2"))
        per_word = WORD // bits
        packed = stem.part("qweight", (torch.int32,))
        width, count = packed.shape[0] * per_word, packed.shape[1]
        group = size_of(self.opened, "group_size", settings.get("group_size", -1))
        groups = group_count(width, group)
        scale = transposed(stem.scale("scales", (groups, count)))
        zeros = stem.part("qzeros", (torch.int32,), (groups, -(-count // per_word)))
        high = 1 << (bits - 1)
        shift = high if bits == 8 else 0
        codes = transposed(unpacked(packed, bits, 0, shift))
        # The same shift as the codes', which int8 takes in; the older form's zeros are one less.
        offset = (shift + (form == "gptq")) % (1 << bits)
        zero = transposed(unpacked(zeros, bits, 1, offset))
        if bits == 8:
            codes, zero = signed(codes), signed(zero)
        middle = 0 if bits == 8 else high
        symmetric = bool(settings.get("sym")) and _all_are(zero, middle)
        stored = StoredCodes(codes, scale, None if symmetric else zero, group=group)
        return stem.ordered(stored, "g_idx") if stem.has("g_idx") else stored

    def _settings_of(self, name: str) -> Mapping[str, object]:
        """The settings with what GPTQModel's ``dynamic`` says of a linear."""
        dynamic = table(self.opened, self.settings, "dynamic")
        for pattern in dynamic:
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
                return {**self.settings, **table(self.opened, dynamic, pattern)}
        return self.settings


def _all_are(zero: Weight, number: int) -> bool:
    return bool((zero.load() == number).all())

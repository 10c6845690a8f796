"""Checkpoints of compressed-tensors (llm-compressor): pack-, int-, float- and naive-quantized.

``weight_packed`` int32 [N, K bits / 32] holds codes of 4 or 8 bits beside each other, the lowest
bits first and half of their range added; ``weight_zero_point`` those of a column below each other;
``weight_shape`` is [N, K]. The other formats hold ``weight`` in int8 or e4m3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch

from ..stored_codes import StoredCodes
from ..weight_packed import WORD
from ..weights import Weight, apply_weight
from .base import (
    Layout,
    Opened,
    Stem,
    block_of,
    by_rows,
    group_count,
    matches,
    names,
    one_of,
    signed,
    size_of,
    table,
    unpacked,
)

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_STRATEGIES = ("tensor", "channel", "group", "block")
_DTYPES = {("int", 8): torch.int8, ("float", 8): torch.float8_e4m3fn}

Settings = Mapping[str, object]


class Compressed(Layout):
    """Any of the formats; several may be in one checkpoint."""

    parts = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
    )

    def __init__(self, settings: Settings, opened: Opened) -> None:
        super().__init__(settings, opened)
        if settings.get("transform_config"):
            one_of(opened, "transform_config", settings["transform_config"], (None,))
        sparse = table(opened, settings, "sparsity_config")
        one_of(opened, "sparsity_config.format", sparse.get("format", "dense"), ("dense",))

    def keeps(self, name: str) -> bool:
        """See Layout."""
        return matches(names(self.opened, self.settings, "ignore"), name)

    def read(self, stem: Stem) -> StoredCodes:
        """See Layout."""
        group = self._group_of(stem)
        form = group.get("format") or self.settings.get("format")
        one_of(self.opened, "format", form, (*_FORMATS, "mixed-precision", None))
        args = table(self.opened, group, "weights")
        strategy = one_of(self.opened, "weights.strategy", args.get("strategy"), _STRATEGIES)
        if stem.has("weight_packed"):
            stored = self._packed(stem, args, str(strategy))
        else:
            stored = self._whole(stem, args, str(strategy))
        return self._meeting(stem, stored, table(self.opened, group, "input_activations"))

    def _group_of(self, stem: Stem) -> Settings:
        groups = table(self.opened, self.settings, "config_groups")
        for group in (table(self.opened, groups, key) for key in groups):
            if matches(names(self.opened, group, "targets"), stem.name):
                return group
        raise self.opened.wrong(
            stem.full("weight_scale"),
            "a linear that a target of quantization_config.config_groups names",
            "one that none names",
        )

    def _packed(self, stem: Stem, args: Settings, strategy: str) -> StoredCodes:
        bits = cast(int, one_of(self.opened, "weights.num_bits", args.get("num_bits"), (4, 8)))
        one_of(self.opened, "weights.type", args.get("type", "int"), ("int",))
        packed = stem.part("weight_packed", (torch.int32,))
        count, width = _shape(stem, packed, bits)
        # The codes' range is centred by half of it; int8 is by itself.
        offset = 128 if bits == 8 else 0
        codes = unpacked(packed, bits, 1, offset)
        codes = apply_weight("slice", (codes,), dim=1, start=0, stop=width)
        scale, rows, group = _scale(stem, args, strategy, count, width)
        zero = None
        if not args.get("symmetric", True):
            one_of(self.opened, "weights.strategy", strategy, ("channel", "group"))
            words = (-(-count * bits // WORD), scale.shape[1])
            zero = unpacked(stem.part("weight_zero_point", (torch.int32,), words), bits, 0, offset)
            zero = apply_weight("slice", (zero,), dim=0, start=0, stop=count)
        if bits == 8:
            codes, zero = signed(codes), None if zero is None else signed(zero)
        stored = StoredCodes(codes, scale, zero, rows, group)
        return stem.ordered(stored, "weight_g_idx") if stem.has("weight_g_idx") else stored

    def _whole(self, stem: Stem, args: Settings, strategy: str) -> StoredCodes:
        key = (args.get("type", "int"), args.get("num_bits"))
        kind = _DTYPES[cast("tuple[str, int]", one_of(self.opened, "weights", key, (*_DTYPES,)))]
        codes = stem.part("weight", (kind,))
        count, width = codes.shape
        scale, rows, group = _scale(stem, args, strategy, count, width)
        zero = None
        if not args.get("symmetric", True):
            shapes = (tuple(scale.shape), (count,), (1,))
            zero = stem.part("weight_zero_point", (torch.int8,), *shapes)
            zero = zero if zero.shape == scale.shape else by_rows(zero, count)
        stored = StoredCodes(codes, scale, zero, rows, group)
        return stem.ordered(stored, "weight_g_idx") if stem.has("weight_g_idx") else stored

    def _meeting(self, stem: Stem, stored: StoredCodes, args: Settings) -> StoredCodes:
        """The codes with what the other operand is rounded to, where products of both exist."""
        if not args:
            return stored
        kind = _DTYPES.get((str(args.get("type", "int")), cast(int, args.get("num_bits"))))
        group, strategy = 0, args.get("strategy")
        if strategy == "group":
            group = size_of(self.opened, "input_activations.group_size", args.get("group_size"))
        fits = kind == stored.codes.dtype and stored.zero is None and group == stored.group
        if kind is None or not fits or not args.get("symmetric", True):
            self.opened.note("activations stay as they are: no product takes codes of both kinds")
            return stored
        if kind not in self.opened.computes:
            name = str(kind).removeprefix("torch.")
            self.opened.note(f"activations stay as they are: the device has no products in {name}")
            return stored
        static = None
        if args.get("dynamic", False) is False:
            one_of(self.opened, "input_activations.strategy", strategy, ("tensor",))
            static = stem.static_scale("input_scale")
        elif strategy == "tensor":
            self.opened.note(
                "activations get a scale a token, where the checkpoint has one for all"
            )
        return replace(stored, rounds=kind, rounds_group=group, static=static)


def _shape(stem: Stem, packed: Weight, bits: int) -> tuple[int, int]:
    """[N, K] of packed codes, which ``weight_shape`` says."""
    told = stem.part("weight_shape", (torch.int64, torch.int32), (2,))
    count, width = (int(size) for size in told.load())
    if packed.shape != (count, -(-width * bits // WORD)) or min(count, width) < 1:
        expected = f"int32 [{count}, {-(-width * bits // WORD)}], as weight_shape says"
        raise stem.opened.wrong(stem.full("weight_packed"), expected, str(list(packed.shape)))
    return count, width


def _scale(
    stem: Stem, args: Settings, strategy: str, count: int, width: int
) -> tuple[Weight, int, int]:
    """The scales by blocks, and the rows and columns of a block."""
    if strategy == "tensor":
        return by_rows(stem.scale("weight_scale", (1,), (), (1, 1)), count), 1, 0
    if strategy == "channel":
        return by_rows(stem.scale("weight_scale", (count, 1), (count,)), count), 1, 0
    if strategy == "block":
        rows, group = block_of(stem.opened, "block_structure", args.get("block_structure"))
    else:
        rows, group = 1, size_of(stem.opened, "weights.group_size", args.get("group_size"))
    shape = (group_count(count, rows), group_count(width, group))
    return stem.scale("weight_scale", shape), rows, group

"""The parts of a quantized weight, found again in the expression that it is.

Readers of quantized checkpoints make a weight with `weight`; passes concatenate and cut such
weights as any others; `codes_of` then tells the parts of the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .weight_ops import AttrValue
from .weight_quant import MIDDLE
from .weights import Apply, Weight, apply_weight

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """A weight [N, K] in codes.

    Attributes:
        codes: [N, K], one a byte: uint8 (4 bits), int8 or float8_e4m3fn.
        scale: [ceil(N / rows), ceil(K / group)]; a group of 0 is all columns.
        zero: of 4-bit codes, as `scale`; None for `MIDDLE`.
        rows, group: what a scale covers.
        order: int64 [K]: column i of the codes is column order[i] of the weight; None for all in
            their places.
        rounds: the dtype of codes that the other operand is rounded to; None where it is kept.
        rounds_group: columns that share a scale there.
        static: the scale [1] of that operand; None for one a row.
    """

    codes: Weight
    scale: Weight
    zero: Weight | None = None
    rows: int = 1
    group: int = 0
    order: Weight | None = None
    rounds: torch.dtype | None = None
    rounds_group: int = 0
    static: Weight | None = None

    def weight(self) -> Weight:
        """The float32 weight [N, K] that the parts stand for, as an expression."""
        zero = self.zero
        if zero is None and self.codes.dtype == torch.uint8:
            zero = middle_of(self.scale)
        block: dict[str, AttrValue] = {"rows": self.rows, "group": self.group}
        parts = (self.codes, self.scale) if zero is None else (self.codes, self.scale, zero)
        found = apply_weight("dequantize_codes", parts, dtype=torch.float32, **block)
        if self.order is not None:
            back = apply_weight("argsort", (self.order,))
            found = apply_weight("take", (found, back), dim=1)
        if self.rounds is not None:
            args = (found,) if self.static is None else (found, self.static)
            group = self.rounds_group
            found = apply_weight("meets_codes", args, dtype=self.rounds, group=group)
        return found

    @property
    def grid(self) -> tuple[object, ...]:
        """What weights have in common whose parts may be concatenated."""
        aligned = self.codes.shape[0] % self.rows == 0
        return (
            self.codes.shape[1],
            self.codes.dtype,
            self.scale.dtype,
            self.zero is None,
            self.rows if aligned else self.codes,
            self.group,
            self.order,
            self.rounds,
            self.rounds_group,
            self.static,
        )


def middle_of(scale: Weight) -> Weight:
    """Zero points of 8, one for each scale."""
    from .made import Full

    return Full(MIDDLE, tuple(scale.shape), torch.uint8)


def codes_of(weight: object) -> StoredCodes | None:
    """The parts of a weight that is in codes, of concatenated rows of such, or of some of their
    rows; None for any other weight. Casts between floats are looked through.
    """
    if not isinstance(weight, Apply):
        return None
    attrs, first = dict(weight.attrs), weight.args[0]
    if weight.op == "dequantize_codes":
        return _parts(weight, attrs)
    if weight.op == "concat" and attrs["dim"] == 0:
        return _joined([codes_of(arg) for arg in weight.args])
    if weight.op == "permute":
        return _turned_twice(weight)
    found = codes_of(first)
    if found is None:
        return None
    if weight.op == "cast":
        return found if weight.dtype in FLOATS else None
    if weight.op == "meets_codes":
        static = _operand(weight, 1) if len(weight.args) > 1 else None
        dtype, group = attrs["dtype"], attrs["group"]
        assert isinstance(dtype, torch.dtype) and isinstance(group, int)
        return replace(found, rounds=dtype, rounds_group=group, static=static)
    if weight.op == "take" and attrs["dim"] == 1 and found.order is None:
        back = weight.args[1]
        if not isinstance(back, Apply) or back.op != "argsort":
            return None
        return replace(found, order=_operand(back, 0))
    if weight.op == "slice" and attrs["dim"] == 0 and found.rows == 1:
        return _cut(found, attrs)
    return None


def grid_of(weight: object) -> tuple[object, ...] | None:
    """`StoredCodes.grid` of a weight in codes, None for any other."""
    found = codes_of(weight)
    return None if found is None else found.grid


def _parts(weight: Apply, attrs: dict[str, AttrValue]) -> StoredCodes:
    codes, scale = _operand(weight, 0), _operand(weight, 1)
    zero = _operand(weight, 2) if len(weight.args) > 2 else None
    rows, group = attrs["rows"], attrs["group"]
    assert isinstance(rows, int) and isinstance(group, int)
    return StoredCodes(codes, scale, None if zero == middle_of(scale) else zero, rows, group)


def _operand(weight: Apply, index: int) -> Weight:
    operand = weight.args[index]
    assert isinstance(operand, Weight), "an operation that takes no plain numbers"
    return operand


def _turned_twice(weight: Apply) -> StoredCodes | None:
    inner = weight.args[0]
    while isinstance(inner, Apply) and inner.op == "cast":
        inner = inner.args[0]
    if not isinstance(inner, Apply) or inner.op != "permute" or inner.attrs != weight.attrs:
        return None
    return codes_of(inner.args[0]) if dict(weight.attrs)["dims"] == (1, 0) else None


def _joined(members: list[StoredCodes | None]) -> StoredCodes | None:
    found = [member for member in members if member is not None]
    if len(found) < len(members) or len({member.grid for member in found}) != 1:
        return None

    def join(parts: list[Weight | None]) -> Weight | None:
        held = tuple(part for part in parts if part is not None)
        return apply_weight("concat", held, dim=0) if held else None

    codes, scale = (join([getattr(m, part) for m in found]) for part in ("codes", "scale"))
    assert codes is not None and scale is not None
    return replace(found[0], codes=codes, scale=scale, zero=join([m.zero for m in found]))


def _cut(found: StoredCodes, attrs: dict[str, AttrValue]) -> StoredCodes:
    def cut(part: Weight) -> Weight:
        return apply_weight("slice", (part,), **attrs)

    zero = None if found.zero is None else cut(found.zero)
    return replace(found, codes=cut(found.codes), scale=cut(found.scale), zero=zero)

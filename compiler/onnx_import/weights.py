"""Constants and weights of a graph; linears in codes stay in codes, as an expression."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from ...formats.stored_codes import StoredCodes
from ...formats.weights import Held, Weight
from .call import OURS
from .model import Step
from .rules.table import MICROSOFT

_LARGEST_CONSTANT = 64  # elements; axes, shapes and splits are shorter


def is_constant(tensor: torch.Tensor) -> bool:
    """Whether a tensor is traced as numbers: a single one, or a few integers."""
    few = tensor.numel() <= _LARGEST_CONSTANT and tensor.dim() <= 1
    return tensor.numel() == 1 or (few and not tensor.dtype.is_floating_point)


@dataclass(slots=True)
class Coded:
    """Replaces steps over codes by weights that are expressions.

    Attributes:
        tensors: of the file by name.
        four_bits: the names of those of 4 bits, one code a byte.
        weights: the expressions that were made, by the name of the value.
    """

    tensors: Mapping[str, torch.Tensor]
    four_bits: Collection[str]
    weights: dict[str, Weight]

    def replaced(self, step: Step) -> Step | None:
        """The step that stands for this one; None where a weight does."""
        if step.op == "DequantizeLinear" and not step.domain:
            stored = self._dequantized(step)
            if stored is None:
                return step
            self.weights[step.outputs[0]] = stored.weight()
            return None
        if step.op == "MatMulNBits" and step.domain == MICROSOFT:
            stored = self._blocked(step)
            if stored is None:
                return step
            name = f"{step.inputs[1]}.weight"
            self.weights[name] = stored.weight()
            bias = step.inputs[5] if len(step.inputs) > 5 else ""
            return replace(step, op="Linear", domain=OURS, inputs=(step.inputs[0], name, bias))
        return step

    def _dequantized(self, step: Step) -> StoredCodes | None:
        """[N, K] of int8 or 4 bits in float32, by rows, tensors, or groups of columns."""
        names = [*step.inputs, ""][:3]
        parts = [self.tensors.get(name) for name in names if name]
        if any(part is None for part in parts):
            return None
        codes, scale, *zeros = (part for part in parts if part is not None)
        block, axis = step.integer("block_size", 0), step.integer("axis", 1)
        fits = codes.dim() == 2 and scale.dtype is torch.float32
        fits = fits and not step.attributes.get("output_dtype")
        if not fits or (axis % 2 != (1 if block else 0) and scale.numel() != 1):
            return None
        whole = scale.numel() == 1
        shape = (1, 1) if whole else (len(codes), -1)
        zero = zeros[0].reshape(shape) if zeros else None
        four = names[0] in self.four_bits
        if four:
            codes, zero = _unsigned(codes), None if zero is None else _unsigned(zero)
        elif codes.dtype is not torch.int8 or (zero is not None and bool(zero.any())):
            return None
        name = names[0]
        return StoredCodes(
            Held(codes, name),
            Held(scale.reshape(shape), f"{name}.scale"),
            Held(zero, f"{name}.zero") if zero is not None and four else None,
            rows=0 if whole else 1,
            group=block,
        )

    def _blocked(self, step: Step) -> StoredCodes | None:
        """The weight of a MatMulNBits of 4 bits, or of 8 around 128."""
        bits, block, width, count = map(step.integer, ("bits", "block_size", "K", "N"))
        names = [*step.inputs, "", "", "", ""][:5]
        codes, scale = self.tensors.get(names[1]), self.tensors.get(names[2])
        packed = self.tensors.get(names[3]) if names[3] else None
        unknown = codes is None or scale is None or bool(names[4])
        if unknown or bits not in (4, 8) or (bits == 8 and names[3]):
            return None
        if names[3] and (packed is None or packed.dtype is not torch.uint8):
            return None
        assert codes is not None and scale is not None
        groups = -(-width // block)
        rows = codes.reshape(count, -1)
        if bits == 4:
            whole = _nibbles(rows)[:, :width].contiguous()
        else:
            whole = (rows[:, :width].to(torch.int16) - 128).to(torch.int8)
        zero = None
        if packed is not None:
            zero = _nibbles(packed.reshape(count, -1))[:, :groups].contiguous()
        name = names[1]
        return StoredCodes(
            Held(whole, name),
            Held(scale.reshape(count, groups).float(), f"{name}.scale"),
            None if zero is None else Held(zero, f"{name}.zero"),
            group=block if groups > 1 else 0,
        )


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N, W] as [N, 2 W], the low half of each byte first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def _unsigned(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes as 0 … 15."""
    return codes if codes.dtype is torch.uint8 else (codes + 8).to(torch.uint8)

"""Quantized linears as compressed-tensors holds them, for folders that others load.

``quantization_config`` and the tensors of a linear: pack-quantized (int4; int8 with activations
as they are), int-quantized (int8 with activations rounded) or float-quantized (e4m3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .weight_packed import WORD


@dataclass(frozen=True, slots=True)
class Codes:
    """One linear.

    Attributes:
        codes: [N, K]: uint8 (one 4-bit code a byte), int8 or float8_e4m3fn.
        scale: [blocks of N, blocks of K].
        zero: of 4-bit codes, as `scale`; None for 8.
        static: the scale [1] of the other operand.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    static: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Grouping:
    """What scales cover, and what activations are rounded to.

    Attributes:
        codes: torch dtype of the codes; uint8 for 4 bits.
        rows, group: of a block; 0 for all.
        symmetric: whether there are no zero points.
        activations: "none", "token", "tensor" (static) or "block".
    """

    codes: torch.dtype
    rows: int
    group: int
    symmetric: bool
    activations: str

    @property
    def packed(self) -> bool:
        """Whether codes are packed into int32."""
        return self.codes == torch.uint8 or (self.codes == torch.int8 and self._weights_only)

    @property
    def _weights_only(self) -> bool:
        return self.activations == "none"

    @property
    def format(self) -> str:
        """The name of the format."""
        if self.packed:
            return "pack-quantized"
        return "int-quantized" if self.codes == torch.int8 else "float-quantized"

    def settings(self, ignore: Sequence[str]) -> dict[str, object]:
        """``quantization_config`` of config.json, for all linears but those in ``ignore``."""
        kind = {
            "num_bits": 4 if self.codes == torch.uint8 else 8,
            "type": "float" if self.codes == torch.float8_e4m3fn else "int",
        }
        if self.rows > 1:
            blocks: dict[str, object] = {
                "strategy": "block",
                "block_structure": [self.rows, self.group],
            }
        elif self.group:
            blocks = {"strategy": "group", "group_size": self.group}
        else:
            blocks = {"strategy": "channel" if self.rows else "tensor"}
        weights = {**kind, "symmetric": self.symmetric, "dynamic": False, **blocks}
        inputs: dict[str, object] | None = {
            **kind,
            "symmetric": True,
            "dynamic": self.activations != "tensor",
            "strategy": {"block": "group"}.get(self.activations, self.activations),
        }
        if self.activations == "block" and inputs is not None:
            inputs["group_size"] = self.group
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None if self._weights_only else inputs,
            "output_activations": None,
            "format": self.format,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def tensors(self, linear: Codes) -> Mapping[str, Tensor]:
        """The tensors of a linear by suffix."""
        scale = linear.scale if self.rows else linear.scale.reshape(1)
        found = {"weight_scale": scale.contiguous()}
        if self.packed:
            bits = 4 if self.codes == torch.uint8 else 8
            middle = 0 if bits == 4 else 128  # int8 codes are centred, packed ones are not
            found["weight_packed"] = pack_words(linear.codes.int() + middle, bits)
            found["weight_shape"] = torch.tensor(linear.codes.shape, dtype=torch.int64)
            if linear.zero is not None:
                found["weight_zero_point"] = pack_words(linear.zero.int().T, bits).T.contiguous()
        else:
            found["weight"] = linear.codes.contiguous()
        if linear.static is not None:
            found["input_scale"] = linear.static
        return found


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int32 codes [R, C], none negative -> int32 words [R, C bits / 32], the lowest bits first; the
    last word is filled up with zeros.
    """
    per_word = WORD // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    words = torch.zeros(padded.shape[0], padded.shape[1] // per_word, dtype=torch.int32)
    for place in range(per_word):
        words |= padded[:, place::per_word] << (place * bits)
    return words

"""Checkpoints that others quantized: their linears as weights in codes, by ``quant_method``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..weights import Stored, Weight
from .awq import Awq
from .base import Layout, Opened, Stem
from .compressed import Compressed
from .fp8_blocks import Fp8Blocks
from .gptq import Gptq

LAYOUTS: Mapping[str, type[Layout]] = {
    "compressed-tensors": Compressed,
    "gptq": Gptq,
    "awq": Awq,
    "fp8": Fp8Blocks,
}
"""How linears are held, by the ``quant_method`` of ``quantization_config``."""
CODES = (torch.int8, torch.float8_e4m3fn)
_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale")


@dataclass(frozen=True, slots=True)
class Prequantized:
    """What a quantized checkpoint holds.

    Attributes:
        weights: by the name that the tensor has in the model without codes (``NAME.weight`` for
            ``NAME.qweight`` and the rest).
        linears: the names that are in codes.
        notes: what is done otherwise than the checkpoint says.
    """

    weights: Mapping[str, Weight]
    linears: frozenset[str]
    notes: tuple[str, ...]


def check_method(settings: object, where: str) -> Mapping[str, object]:
    """``quantization_config`` of a kind that can be read.

    Raises:
        CheckpointError: another ``quant_method``; it lists those that can be.
    """
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(settings, dict) or method not in LAYOUTS:
        raise CheckpointError(
            f"{where}: quantization_config",
            expected=f"a quant_method among {', '.join(LAYOUTS)}",
            found=f"weights quantized by {method}",
            remedy="Compile the original model; quantize=… quantizes it while compiling.",
        )
    return settings


def read_prequantized(
    checkpoint: Checkpoint,
    settings: object,
    where: str,
    computes: Collection[torch.dtype] = CODES,
) -> Prequantized:
    """The weights of a quantized checkpoint; of tensors only small ones are read.

    Args:
        checkpoint: its tensors.
        settings: ``quantization_config`` of config.json.
        where: the folder, for messages.
        computes: the element types of codes that the device has products of; activations that
            would be rounded to others stay as they are.

    Raises:
        CheckpointError: a kind that is not known, or tensors that are not of it.
    """
    known = check_method(settings, where)
    opened = Opened(checkpoint, where, frozenset(computes))
    layout = LAYOUTS[str(known["quant_method"])](known, opened)
    suffixes: dict[str, set[str]] = defaultdict(set)
    for name in checkpoint.names():
        stem, _, suffix = name.rpartition(".")
        suffixes[stem].add(suffix)
    weights: dict[str, Weight] = {}
    linears = set()
    for stem, held in suffixes.items():
        rest = set(held)
        if not layout.keeps(stem) and _in_codes(checkpoint, layout, stem, held):
            name = f"{stem}.weight"
            weights[name] = layout.read(Stem(opened, stem, frozenset(held))).weight()
            linears.add(name)
            rest -= {"weight", *layout.parts}
        for suffix in rest:
            name = f"{stem}.{suffix}" if stem else suffix
            if name.endswith(_CACHE_SCALES):
                opened.note("the KV cache stays in floats: scales for one in codes are not used")
            else:
                weights[name] = Stored(checkpoint, name)
    if not linears:
        raise CheckpointError(
            f"{where}: quantization_config",
            expected=f"linears in codes of {known['quant_method']}: {', '.join(layout.parts)}",
            found="none among the tensors",
            remedy="Remove quantization_config from config.json if the weights are numbers.",
        )
    return Prequantized(weights, frozenset(linears), tuple(opened.notes))


def _in_codes(checkpoint: Checkpoint, layout: Layout, stem: str, held: set[str]) -> bool:
    if not held.isdisjoint(layout.parts):
        return True
    return "weight" in held and checkpoint.tensor(f"{stem}.weight").dtype in CODES


__all__ = ["CODES", "LAYOUTS", "Prequantized", "check_method", "read_prequantized"]

"""``int8-weight``: int8 weights with a scale a row; activations stay as they are."""

from __future__ import annotations

from ...ir.dtypes import DType
from .eight_bit import EightBit


class Int8Weight(EightBit):
    """W8A16: the weight bytes halve, products compute in the activations' type. Groups of 32 hold
    what a GGUF file has in Q8_0 without a loss.
    """

    name = "int8-weight"
    codes = DType.I8
    groups = (0, 128, 64, 32)
    methods = ("rtn", "gptq")
    computes = ("float", "int8")


SCHEME = Int8Weight()

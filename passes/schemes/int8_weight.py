"""``int8-weight``: int8 weights with a scale a row; activations stay as they are."""

from __future__ import annotations

from ...ir.dtypes import DType
from .eight_bit import EightBit


class Int8Weight(EightBit):
    """W8A16: the weight bytes halve, products compute in the activations' type."""

    name = "int8-weight"
    codes = DType.I8
    methods = ("rtn", "gptq")
    computes = ("float", "int8")


SCHEME = Int8Weight()

"""``fp8-weight``: e4m3 weights with a scale a row; activations stay as they are."""

from __future__ import annotations

from ...ir.dtypes import DType
from .eight_bit import EightBit


class Fp8Weight(EightBit):
    """W8A16 in FP8, for devices that store it but do not compute in it."""

    name = "fp8-weight"
    codes = DType.F8E4M3
    methods = ("rtn", "gptq")


SCHEME = Fp8Weight()

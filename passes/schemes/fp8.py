"""``fp8``: e4m3 weights with a scale a row, e4m3 activations with a scale a token."""

from __future__ import annotations

from ...ir.dtypes import DType
from .eight_bit import EightBit


class Fp8(EightBit):
    """W8A8 in FP8, per channel x per token; nothing to calibrate."""

    name = "fp8"
    codes = DType.F8E4M3
    methods = ("rtn", "gptq", "smoothquant")
    activations = "token"
    rate = "float8_e4m3fn"


SCHEME = Fp8()

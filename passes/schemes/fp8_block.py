"""``fp8-block``: e4m3 weights by blocks of 128 x 128, e4m3 activations by 128 columns a token."""

from __future__ import annotations

from ...ir.dtypes import DType
from .eight_bit import EightBit


class Fp8Block(EightBit):
    """W8A8 in FP8 with fine scales (DeepSeek-V3, 2412.19437, section 3.3)."""

    name = "fp8-block"
    codes = DType.F8E4M3
    groups = (128,)
    block_rows = 128
    activations = "block"
    rate = "float8_e4m3fn"


SCHEME = Fp8Block()

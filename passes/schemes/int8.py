"""``int8``: int8 weights with a scale a row, int8 activations with a scale a token."""

from __future__ import annotations

from ...ir.dtypes import DType
from .eight_bit import EightBit


class Int8(EightBit):
    """W8A8: sums in int32. Channels of large activations are first smoothed into the weights, where
    a norm or a gate makes them (SmoothQuant, Xiao et al., 2211.10438).
    """

    name = "int8"
    codes = DType.I8
    methods = ("smoothquant", "rtn")
    activations = "token"
    rate = "int8"


SCHEME = Int8()

"""``fp8-tensor``: e4m3 weights with one scale, e4m3 activations with one calibrated scale."""

from __future__ import annotations

from ...ir.dtypes import DType
from .eight_bit import EightBit


class Fp8Tensor(EightBit):
    """W8A8 in FP8, per tensor. Projections that are merged into one product (q, k and v; gate and
    up) have one scale, the largest of theirs. The scale of activations is calibrated: one that is
    made at run time over a whole batch would mix its requests.
    """

    name = "fp8-tensor"
    codes = DType.F8E4M3
    block_rows = 0
    activations = "tensor"
    rate = "float8_e4m3fn"


SCHEME = Fp8Tensor()

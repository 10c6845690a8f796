"""All rules, by domain and op."""

from __future__ import annotations

from collections.abc import Mapping

from ..call import OURS, Rule
from . import attention, contractions, elementwise, norms, quantized, reductions, shapes

MICROSOFT = "com.microsoft"
RULES: Mapping[str, Mapping[str, Rule]] = {
    "": {
        **elementwise.RULES,
        **shapes.RULES,
        **reductions.RULES,
        **contractions.RULES,
        **norms.RULES,
        **attention.RULES,
        **quantized.RULES,
        # Sizes are always known: rules/known.py has them.
        **dict.fromkeys(("Shape", "Size", "ConstantOfShape"), shapes.RULES["Constant"]),
    },
    OURS: {"Linear": contractions.linear},
    MICROSOFT: {**norms.MICROSOFT, **attention.MICROSOFT, "Gelu": elementwise.RULES["Gelu"]},
}
"""The empty domain is ONNX's own. MatMulNBits becomes `OURS` Linear when its weight is
read."""

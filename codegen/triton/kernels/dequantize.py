"""A weight in codes as numbers, for products of so many tokens that a library computes them.

What it costs is memory: codes are read once and numbers written once, whatever the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....ir.dtypes import DType
from ....ir.node import Attr, Node
from ....ir.ops.quant import MIDDLE
from ....targets import Target
from ..layout import Layout, is_dense
from ..source import (
    HEADER,
    Constexpr,
    KernelSource,
    Launch,
    Pointer,
    Variant,
    has_e4m3,
    jit_text,
)
from . import quant_linear_kernel
from .entries import described, entry_of

_OPERANDS = ("q", "scale", "zero")
_COLUMNS, _NUMBERS = 1024, 4096  # of a program, at most: 32 numbers a thread
_WARPS = 4
_FLOATS = (DType.F32, DType.F16, DType.BF16)
_ZEROS = (*_FLOATS, DType.U8, DType.I8)  # all of them are exact in float32


def emit_dequantize(
    node: Node, layouts: Sequence[Layout | None], target: Target
) -> KernelSource | None:
    """A kernel for ``dequantize``.

    None for other nodes, for float64, for an operand that is a view, and for e4m3 where the target
    has no type for it.
    """
    if node.op != "dequantize":
        return None
    q, scale, *zero = node.operands
    present = [(a, x) for a, x in zip(node.args, layouts, strict=True) if a is not None]
    dense = all(x is not None and is_dense(x, a.shape) for a, x in present)
    known = node.dtype in _FLOATS and scale.dtype in _FLOATS
    known = known and all(arg.dtype in _ZEROS for arg in zero)
    if not (dense and known) or (q.dtype.is_float8 and not has_e4m3(target)):
        return None
    n, k, width = (_static(size) for size in (*node.shape, q.shape[1]))
    rows, group = _static(node.attr("rows"), 1), _static(node.attr("group"), 0)
    block_k = min(_COLUMNS, max(16, 1 << (k - 1).bit_length()))
    shared = group & -group if group else block_k  # columns, a power of two, that lie in one group
    middle = MIDDLE if q.dtype is DType.U8 and node.args[2] is None else None
    constants: dict[str, Constexpr | None] = {
        "N": n,
        "K": k,
        "WIDTH": width,
        "ROWS": rows,
        "GROUP": group,
        "SPAN": min(shared, block_k),
        "MIDDLE": middle,
        "zero": None,
    }
    operands = [
        Pointer(name, arg.dtype, "operand", index)
        for index, (name, arg) in enumerate(zip(_OPERANDS, node.args, strict=False))
        if arg is not None
    ]
    block_n = max(1, _NUMBERS // block_k)
    tiling = {"BLOCK_N": block_n, "BLOCK_K": block_k}
    grid = (-(-n // block_n), -(-k // block_k), 1)
    pointers = (*operands, Pointer("out", node.dtype, "result", 0))
    launch = Launch("dequantize", pointers, grid, tiling, _WARPS)
    entry = entry_of(launch, "_dequantized", (), constants)
    text = HEADER + described(node, _OPERANDS)
    text += jit_text(quant_linear_kernel, ("_coded", "_shared_rows", "_of_spans", "_dequantized"))
    text += entry.text
    return KernelSource("dequantize", "template", text, (Variant((entry.launch,)),))


def _static(value: Attr, default: int | None = None) -> int:
    """A size or an attribute of the op, which takes no symbols there."""
    found = default if value is None else value
    assert isinstance(found, int)
    return found

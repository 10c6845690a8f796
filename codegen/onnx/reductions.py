"""Reductions and scans as ONNX."""

from __future__ import annotations

from ...ir.dtypes import DType
from ...ir.node import Node
from .emitter import ELEMENT_TYPES, Converter, Emitter, Refusal

_REDUCTIONS = {
    "sum": "ReduceSum",
    "mean": "ReduceMean",
    "amax": "ReduceMax",
    "amin": "ReduceMin",
    "prod": "ReduceProd",
    "any": "ReduceMax",
    "all": "ReduceMin",
}


def _reduce(e: Emitter, node: Node, x: str) -> str | Refusal:
    dims = node.attr("dims")
    assert isinstance(dims, tuple)
    test = node.op in ("any", "all")
    if test:
        truth = e.op("Cast", x, to=ELEMENT_TYPES[DType.BOOL])
        x = e.op("Cast", truth, to=ELEMENT_TYPES[DType.I32])
    elif node.dtype is DType.BOOL:
        return Refusal("a reduction of booleans")
    elif node.op == "prod" and node.dtype.is_integer:
        return Refusal("a product of integers, which ONNX Runtime does not wrap")
    if _may_be_empty(node):
        return Refusal("a reduction of nothing")
    if dims:
        axes = e.ints(*dims)  # type: ignore[arg-type]
        keep = int(bool(node.attr("keepdim")))
        found = e.op(_REDUCTIONS[node.op], x, axes, keepdims=keep)
        if node.op in ("amax", "amin") and node.dtype.is_float:
            found = or_nan(e, x, axes, keep, found)
        x = found
    return e.op("Cast", x, to=ELEMENT_TYPES[DType.BOOL]) if test else _own(e, x, dims)


def _may_be_empty(node: Node) -> bool:
    """Whether a dimension is 0: its mean is NaN, and `all` of it true, unlike in ONNX Runtime."""
    dims = node.attr("dims")
    assert isinstance(dims, tuple)
    return any(node.operands[0].shape[d] == 0 for d in dims if isinstance(d, int))


def or_nan(e: Emitter, x: str, axes: str, keep: int, found: str) -> str:
    """ONNX Runtime's extremes pass over NaN beside an infinity."""
    bad = e.op("Cast", e.op("IsNaN", x), to=ELEMENT_TYPES[DType.I32])
    any_bad = e.op(
        "Cast", e.op("ReduceMax", bad, axes, keepdims=keep), to=ELEMENT_TYPES[DType.BOOL]
    )
    # The sum is NaN where anything in it is, and has the element type.
    return e.op("Where", any_bad, e.op("ReduceSum", x, axes, keepdims=keep), found)


def _own(e: Emitter, x: str, dims: tuple[object, ...]) -> str:
    return x if dims else e.op("Identity", x)


def _arg(e: Emitter, node: Node, x: str) -> str:
    op_type = "ArgMax" if node.op == "argmax" else "ArgMin"
    dim, keep = node.attr("dim"), int(bool(node.attr("keepdim")))
    assert isinstance(dim, int)
    found = e.op(op_type, x, axis=dim, keepdims=keep)
    if not node.operands[0].dtype.is_float:
        return found
    # NaN is both the greatest and the least; ONNX Runtime may pass over it.
    bad = e.op("Cast", e.op("IsNaN", x), to=ELEMENT_TYPES[DType.I32])
    any_bad = e.op("ReduceMax", bad, e.ints(dim), keepdims=keep)
    any_bad = e.op("Cast", any_bad, to=ELEMENT_TYPES[DType.BOOL])
    return e.op("Where", any_bad, e.op("ArgMax", bad, axis=dim, keepdims=keep), found)


def _softmax(e: Emitter, node: Node, x: str) -> str:
    return e.op("Softmax", x, axis=node.attr("dim"))


def _cumsum(e: Emitter, node: Node, x: str) -> str:
    dim = node.attr("dim")
    assert isinstance(dim, int)
    return e.op("CumSum", x, e.scalar(dim, DType.I64))


def _topk(e: Emitter, node: Node, x: str) -> tuple[str, ...]:
    k = node.attr("k")
    assert isinstance(k, int)
    # Always sorted: an unsorted result may have any order.
    largest = int(bool(node.attr("largest")))
    return e.ops("TopK", x, e.ints(k), count=2, axis=node.attr("dim"), largest=largest, sorted=1)


CONVERTERS: dict[str, Converter] = {
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "argmax": _arg,
    "argmin": _arg,
    "softmax": _softmax,
    "cumsum": _cumsum,
    "topk": _topk,
}

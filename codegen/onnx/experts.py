"""moe_experts as ONNX: each expert over the tokens that chose it; the others' are not read."""

from __future__ import annotations

from ...ir.build import make, reshape
from ...ir.dtypes import DType
from ...ir.node import Node
from ..constants import is_constant
from .emitter import ELEMENT_TYPES, Converter, Emitter, Refusal
from .norms import activate


def moe_experts(
    e: Emitter,
    node: Node,
    x: str,
    expert_ids: str,
    expert_weights: str,
    *tables: str,
    narrow: bool = False,
) -> str | Refusal:
    """The sum over each token's experts; ``narrow`` takes 16-bit types too, whose results are no
    engine's.
    """
    weights = node.operands[3:]
    narrow = narrow and node.dtype in (DType.F16, DType.BF16)
    if node.dtype not in (DType.F32, DType.F64) and not narrow:
        return Refusal(f"experts in {node.dtype}")
    if not all(map(is_constant, weights)):
        return Refusal("experts whose weights are computed")
    count = node.operands[3].shape[0]
    assert isinstance(count, int)
    # ONNX Runtime adds no 16-bit numbers up in place.
    sums = DType.F32 if narrow else node.dtype
    if node.operands[2].dtype is not sums:
        expert_weights = e.op("Cast", expert_weights, to=ELEMENT_TYPES[sums])
    zero = e.scalar(0.0, sums)
    out = e.op("Expand", zero, e.op("Shape", x))
    for expert in range(count):
        chosen = e.op("Equal", expert_ids, e.scalar(expert, node.operands[1].dtype))
        share = e.op(
            "ReduceSum", e.op("Where", chosen, expert_weights, zero), e.ints(1), keepdims=1
        )
        any_ = e.op("ReduceMax", e.op("Cast", chosen, to=ELEMENT_TYPES[DType.I32]), e.ints(1))
        rows = e.op("Squeeze", e.op("NonZero", e.op("Squeeze", any_, e.ints(1))), e.ints(0))
        result = _expert(e, node, e.op("Gather", x, rows, axis=0), expert)
        if narrow:
            result = e.op("Cast", result, to=ELEMENT_TYPES[sums])
        scaled = e.op("Mul", result, e.op("Gather", share, rows, axis=0))
        where = e.op("Unsqueeze", rows, e.ints(1))
        out = e.op("ScatterND", out, where, scaled, reduction="add")
    return e.op("Cast", out, to=ELEMENT_TYPES[node.dtype]) if narrow else out


def _expert(e: Emitter, node: Node, x: str, expert: int) -> str:
    """One expert over its rows, maybe none."""
    gate_up, down, up_bias, down_bias = (
        "" if table is None else e.fold(_of_expert(table, expert))
        for table in (*node.args[3:], None, None)[:4]
    )
    hidden = e.op("Gemm", x, gate_up, up_bias, transB=1)
    width = node.operands[4].shape[2]
    assert isinstance(width, int)
    return e.op("Gemm", _act(e, node, hidden, width), down, down_bias, transB=1)


def _of_expert(table: Node, expert: int) -> Node:
    """One expert's part of [E, …]: a view of it, no copy."""
    part = make("slice", table, dim=0, start=expert, stop=expert + 1)
    return reshape(part, *table.shape[1:])


def _act(e: Emitter, node: Node, hidden: str, width: int) -> str:
    if node.attr("interleaved"):
        bounds = ((0, 2 * width, 2), (1, 2 * width, 2))
    else:
        bounds = ((0, width, 1), (width, 2 * width, 1))
    gate, up = (
        e.op("Slice", hidden, e.ints(start), e.ints(stop), e.ints(1), e.ints(step))
        for start, stop, step in bounds
    )
    limit, alpha = node.attr("limit"), node.attr("alpha")
    if isinstance(limit, int | float):
        high, low = e.scalar(float(limit), node.dtype), e.scalar(-float(limit), node.dtype)
        gate, up = e.op("Min", gate, high), e.op("Max", e.op("Min", up, high), low)
    if isinstance(alpha, int | float):
        slope = e.op("Mul", gate, e.scalar(float(alpha), node.dtype))
        shifted = e.op("Add", up, e.scalar(1.0, node.dtype))
        return e.op("Mul", e.op("Mul", gate, e.op("Sigmoid", slope)), shifted)
    return e.op("Mul", activate(e, str(node.attr("activation")), gate), up)


CONVERTERS: dict[str, Converter] = {"moe_experts": moe_experts}

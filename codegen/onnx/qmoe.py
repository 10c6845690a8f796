"""moe_experts over weights in codes as QMoE (com.microsoft), which reads them packed.

The op picks the k experts of the largest ``router_probs`` and weighs them with ``router_weights``;
here both are known: the first says no more than which. Its gate and up rows alternate, and so do
its biases. ONNX Runtime's CPU computes in float32 with 4-bit codes; with 8-bit codes by groups it
rounds activations, which is done where the codes ask for it.
"""

from __future__ import annotations

from ...ir.build import cast, const, make, permute, reshape
from ...ir.dtypes import DType
from ...ir.node import Node
from ..constants import is_constant
from . import experts
from .emitter import ELEMENT_TYPES, MICROSOFT, Emitter, Refusal
from .quantized import INT8_COMPUTE, LEAST_BLOCK, ZERO_CODE, nibbles

# Positions of optional operands of QMoE.
_UP_BIAS, _DOWN, _DOWN_BIAS, _UP_ZERO, _ROUTER_WEIGHTS = 4, 5, 7, 11, 14


def moe_experts(
    e: Emitter, node: Node, x: str, expert_ids: str, expert_weights: str, *tables: str
) -> str | Refusal:
    """By QMoE where both tables are in codes that it takes, else expert by expert."""
    up, down = (_codes_of(table) for table in node.operands[3:5])
    reason = "" if up is None or down is None else _unfit(node, up, down)
    if up is None or down is None or reason:
        if reason:
            e.note(f"experts in codes are expanded to floats: {reason}")
        given = (x, expert_ids, expert_weights, *tables)
        return experts.moe_experts(e, node, *given, narrow=True)
    count, rows, _ = node.operands[3].shape
    assert isinstance(count, int) and isinstance(rows, int)
    chosen, shares = _router(e, node, expert_ids, expert_weights)
    alternates = bool(node.attr("interleaved"))
    up_bias, down_bias = (*node.args[5:], None, None)[:2]
    operands = [""] * (_ROUTER_WEIGHTS + 1)
    operands[:2] = [x, chosen]
    operands[2:4] = _weights(e, up, count, alternates)
    operands[_DOWN : _DOWN + 2] = _weights(e, down, count, True)
    operands[_UP_ZERO : _UP_ZERO + 2] = [
        _zeros(e, up, count, alternates),
        _zeros(e, down, count, True),
    ]
    if up_bias is not None:
        column = _by_expert(reshape(up_bias, count * rows, 1), count, alternates)
        operands[_UP_BIAS] = e.fold(reshape(column, count, rows))
    if down_bias is not None:
        operands[_DOWN_BIAS] = e.fold(down_bias)
    operands[_ROUTER_WEIGHTS] = shares
    alpha, limit = node.attr("alpha"), node.attr("limit")
    return e.op(
        "QMoE",
        *operands,
        domain=MICROSOFT,
        k=node.operands[1].shape[1],
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0 if alpha is None else alpha,
        activation_beta=0.0 if alpha is None else 1.0,
        swiglu_limit=limit,
        expert_weight_bits=4 if up.operands[0].dtype is DType.U8 else 8,
        block_size=up.attr("group") or None,
        accuracy_level=INT8_COMPUTE if up.attr("compute") is DType.I8 else None,
        weights_prepacked=0,
        normalize_routing_weights=0,
    )


def _codes_of(table: Node) -> Node | None:
    """The ``dequantize`` [E * N, K] of a table, if it is one."""
    rows = table.operands[0] if table.op == "reshape" else table
    return rows if rows.op == "dequantize" and is_constant(rows) else None


def _unfit(node: Node, up: Node, down: Node) -> str:
    """Why QMoE cannot take the tables; '' where it can."""
    if node.dtype is not DType.F32:
        return f"they are {node.dtype}"
    if node.attr("alpha") is None and node.attr("activation") != "silu":
        return f"their activation is {node.attr('activation')}"
    if any(arg is not None and not is_constant(arg) for arg in node.args[5:]):
        return "their biases are computed"
    codes, group = up.operands[0].dtype, up.attr("group")
    assert isinstance(group, int)
    if codes not in (DType.U8, DType.I8) or down.operands[0].dtype is not codes:
        return "they are neither all in int8 nor all in 4 bits"
    if group != down.attr("group") or any(table.attr("rows") != 1 for table in (up, down)):
        return "their scales cover different groups"
    widths = [table.shape[1] for table in (up, down)]
    if group and (group < LEAST_BLOCK or group & (group - 1)):
        return f"groups of {group} are no power of two from {LEAST_BLOCK} on"
    if any(not isinstance(width, int) or width % (group or 2) for width in widths):
        return f"columns end within a group of {group}"
    if codes is DType.I8 and group and up.attr("compute") is None:
        return "8-bit groups are faster only where activations are rounded (QuantConfig.compute)"
    zeros = [table.args[2] for table in (up, down) if table.args[2] is not None]
    if zeros and (not group or codes is DType.I8 or any(z.dtype is not DType.U8 for z in zeros)):
        return "zero points other than whole ones of 4-bit groups"
    return ""


def _router(e: Emitter, node: Node, expert_ids: str, expert_weights: str) -> tuple[str, str]:
    """Which experts a token chose and with what weight, each f32[T, E]."""
    ids, weights = node.operands[1:3]
    count = node.operands[3].shape[0]
    assert isinstance(count, int)
    sizes = e.op("Concat", e.op("Shape", expert_ids, end=1), e.ints(count), axis=0)
    none = e.op("Expand", e.scalar(0.0, DType.F32), sizes)
    if ids.dtype is not DType.I64:
        expert_ids = e.op("Cast", expert_ids, to=ELEMENT_TYPES[DType.I64])
    if weights.dtype is not DType.F32:
        expert_weights = e.op("Cast", expert_weights, to=ELEMENT_TYPES[DType.F32])
    ones = e.op("Expand", e.scalar(1.0, DType.F32), e.op("Shape", expert_ids))
    chosen, shares = (
        e.op("ScatterElements", none, expert_ids, values, axis=1)
        for values in (ones, expert_weights)
    )
    return chosen, shares


def _weights(e: Emitter, table: Node, count: int, alternates: bool) -> tuple[str, str]:
    """Codes u8[E, N, bytes], and scales f32[E, N] or [E, N, groups]."""
    codes, scale = table.operands[:2]
    if codes.dtype is DType.I8:
        codes = cast(make("add", cast(codes, DType.I16), const(ZERO_CODE, DType.I16)), DType.U8)
    scale = _by_expert(cast(scale, DType.F32), count, alternates)
    if not table.attr("group"):
        scale = reshape(scale, *scale.shape[:2])
    return e.fold(_by_expert(codes, count, alternates)), e.fold(scale)


def _zeros(e: Emitter, table: Node, count: int, alternates: bool) -> str:
    zero = table.args[2]
    return "" if zero is None else e.fold(_by_expert(nibbles(zero), count, alternates))


def _by_expert(rows: Node, count: int, alternates: bool) -> Node:
    """Rows [E * N, W] as [E, N, W]; gate and up rows in turns, where they do not alternate yet."""
    number, width = rows.shape
    assert isinstance(number, int) and isinstance(width, int)
    if alternates:
        return reshape(rows, count, number // count, width)
    halves = reshape(rows, count, 2, number // count // 2, width)
    return reshape(permute(halves, 0, 2, 1, 3), count, number // count, width)

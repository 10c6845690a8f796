"""Mixture of experts: every token through its own top-k experts, as one op.

With ``alpha`` the experts are those of gpt-oss, and ``activation`` is not used:
``gate * sigmoid(alpha * gate) * (up + 1)``, both halves clamped by ``limit``.
"""

from __future__ import annotations

import torch

from ..dims import Size, call
from ..node import Attr, Node
from ..schema import OpSchema, Sample, ill_typed, register
from ..types import TensorType
from .norm import ACTIVATIONS, widened


def _experts_type(
    x: TensorType,
    expert_ids: TensorType,
    expert_weights: TensorType,
    gate_up: TensorType,
    down: TensorType,
    gate_up_bias: TensorType | None = None,
    down_bias: TensorType | None = None,
    *,
    activation: str,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float | None = None,
) -> TensorType:
    if x.rank != 2 or gate_up.rank != 3 or down.rank != 3 or gate_up.shape[0] != down.shape[0]:
        raise ill_typed(
            "moe_experts", "x [T, K], gate_up [E, 2F, K], down [E, K, F]", x, gate_up, down
        )
    experts, width = gate_up.shape[0], x.shape[1]
    if gate_up.shape[1:] != (down.shape[2] * 2, width) or down.shape[1] != width:
        raise ill_typed("moe_experts", "gate_up [E, 2F, K], down [E, K, F]", x, gate_up, down)
    if expert_ids.shape != expert_weights.shape or expert_ids.shape[:-1] != x.shape[:1]:
        raise ill_typed("moe_experts", "ids and weights [T, k]", expert_ids, expert_weights)
    if not expert_ids.dtype.is_integer or not expert_weights.dtype.is_float:
        raise ill_typed("moe_experts", "integer ids, float weights", expert_ids, expert_weights)
    for bias, size in ((gate_up_bias, gate_up.shape[1]), (down_bias, width)):
        if bias is not None and (bias.shape != (experts, size) or bias.dtype is not x.dtype):
            raise ill_typed("moe_experts", f"a bias [{experts}, {size}] of x's type", x, bias)
    if len({x.dtype, gate_up.dtype, down.dtype}) > 1 or not x.dtype.is_float:
        raise ill_typed("moe_experts", "floats of one element type", x, gate_up, down)
    if activation not in ACTIVATIONS:
        raise ill_typed("moe_experts", f"activation among {sorted(ACTIVATIONS)}", x)
    return x


def _act(
    hidden: torch.Tensor,
    activation: str,
    interleaved: bool,
    limit: float | None,
    alpha: float | None,
) -> torch.Tensor:
    if interleaved:
        gate, up = hidden[..., ::2], hidden[..., 1::2]
    else:
        gate, up = hidden.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if alpha is not None:  # gpt-oss: x · sigmoid(alpha · x), and the other half shifted by one
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    return ACTIVATIONS[activation](gate) * up


def through_expert(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    *,
    activation: str,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What one expert makes of its rows x [R, K], each rounded to their type.

    Args:
        x: rows; gate_up: [2F, K]; down: [K, F]; biases: [2F] and [K], or None.
        activation, interleaved, limit, alpha: as the op has them.

    Returns:
        What its ``down`` takes [R, F], and what that gives [R, K].
    """
    hidden = torch.nn.functional.linear(x, gate_up, gate_up_bias)
    hidden = _act(hidden, activation, interleaved, limit, alpha)
    return hidden, torch.nn.functional.linear(hidden, down, down_bias)


def _experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    *,
    activation: str,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float | None = None,
) -> torch.Tensor:
    out = torch.zeros_like(widened(x))  # k results are added before the one rounding
    for expert in expert_ids.unique().tolist():
        tokens, choice = torch.where(expert_ids == expert)
        _, result = through_expert(
            x[tokens],
            gate_up[expert],
            down[expert],
            None if gate_up_bias is None else gate_up_bias[expert],
            None if down_bias is None else down_bias[expert],
            activation=activation,
            interleaved=interleaved,
            limit=limit,
            alpha=alpha,
        )
        scaled = widened(result) * expert_weights[tokens, choice, None].to(out.dtype)
        out.index_add_(0, tokens, scaled)
    return out.to(x.dtype)


def _flops(node: Node) -> Size:
    x, ids, _, gate_up, down = node.operands[:5]
    return ids.type.numel * x.shape[1] * (gate_up.shape[1] + down.shape[2]) * 2


def _moved(node: Node) -> Size:
    """Weights of as many experts as there are pairs of a token and a slot, or of all; all else."""
    ids, experts = node.operands[1].type, node.operands[3].shape[0]
    used = call("min", ids.numel, experts)
    moved: Size = node.type.nbytes
    for index, operand in enumerate(node.operands):
        nbytes = operand.type.nbytes
        moved = moved + (nbytes if index < 3 else call("floordiv", nbytes, experts) * used)
    return moved


def _samples(g: torch.Generator) -> list[Sample]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    ids = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(5)])
    args = (draw(5, 8), ids, draw(5, 2).softmax(-1), draw(4, 12, 8), draw(4, 8, 6))
    biases = (draw(4, 12), draw(4, 8))
    oss: dict[str, Attr] = {"activation": "silu", "interleaved": True, "limit": 2.0, "alpha": 1.7}
    return [Sample(args, {"activation": "silu"}), Sample((*args, *biases), oss)]


MOE_EXPERTS = register(
    OpSchema(
        "moe_experts",
        (
            "x",
            "expert_ids",
            "expert_weights",
            "gate_up",
            "down",
            "gate_up_bias?",
            "down_bias?",
        ),
        _experts_type,
        _experts,
        ("activation", "interleaved", "limit", "alpha"),
        _flops,
        _samples,
        moved=_moved,
    )
)

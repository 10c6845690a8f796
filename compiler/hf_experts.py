"""The experts of Hugging Face mixtures as one custom op, and the hook that emits it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CaptureError

_SCHEMA = (
    "(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor up, Tensor? up_bias, Tensor down, "
    "Tensor? down_bias, str activation, bool gated, bool transposed) -> Tensor"
)


def _clamped_swiglu(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activation(gate) * up

    return apply


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}
_GATED: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: _gated(function) for name, function in _PLAIN.items()},
    "swiglu_clamped": _clamped_swiglu,
}


@torch.library.custom_op("tilewright::moe_experts", mutates_args=(), schema=_SCHEMA)
def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    transposed: bool,
) -> Tensor:
    """Sum over a token's chosen experts of weight * down(act(up(x))).

    Args:
        x: [T, K]; expert_ids: i64[T, k]; expert_weights: [T, k].
        up: [E, N', K] ([E, K, N'] when `transposed`), N' = 2N when `gated`, else N.
        up_bias: [E, N'] or None.
        down: [E, K, N] ([E, N, K] when `transposed`), down_bias: [E, K] or None.
        activation: silu, gelu, gelu_tanh, relu or relu_squared; gated ones act on the first half of
            N' and multiply by the second; swiglu_clamped (gpt-oss) takes gate and up interleaved,
            clamps them at 7, and has an alpha of 1.702.

    Returns:
        [T, K] in x's dtype.
    """
    act = (_GATED if gated else _PLAIN)[activation]
    out = torch.zeros_like(x)
    for expert in expert_ids.unique().tolist():
        token, slot = torch.where(expert_ids == expert)
        w_up, w_down = (w[expert].T if transposed else w[expert] for w in (up, down))
        hidden = F.linear(x[token], w_up, None if up_bias is None else up_bias[expert])
        hidden = F.linear(act(hidden), w_down, None if down_bias is None else down_bias[expert])
        out.index_add_(0, token, (hidden * expert_weights[token, slot, None]).to(x.dtype))
    return out


@moe_experts.register_fake
def _(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    transposed: bool,
) -> Tensor:
    return torch.empty_like(x)


def experts_hook(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' ExpertsInterface: hidden [T, K], index and weights [T, k] -> [T, K].

    Raises:
        CaptureError: an activation or a post-expert norm that `moe_experts` does not have.
    """
    if getattr(module, "has_post_expert_norm", False):
        _refuse(module, "experts without a norm behind them", "has_post_expert_norm=True")
    gated, biased = bool(module.has_gate), bool(module.has_bias)
    name = "gate_up_proj" if gated else "up_proj"
    out: Tensor = torch.ops.tilewright.moe_experts(
        hidden,
        top_k_index,
        top_k_weights,
        getattr(module, name),
        getattr(module, f"{name}_bias") if biased else None,
        module.down_proj,
        module.down_proj_bias if biased else None,
        _activation_name(module, gated),
        gated,
        bool(module.is_transposed),
    )
    return out


def _activation_name(module: nn.Module, gated: bool) -> str:
    """Name of the activation that gives the module's own numbers on a probe."""
    # a thread of its own: the export's dispatch modes are thread-local
    with ThreadPoolExecutor(1) as pool:
        name = pool.submit(_matching_activation, module, gated).result()
    if name is None:
        _refuse(
            module,
            f"an activation among {', '.join(_GATED if gated else _PLAIN)}",
            f"{module.act_fn}",
        )
    return str(name)


def _matching_activation(module: nn.Module, gated: bool) -> str | None:
    probe = torch.linspace(-12, 12, 194).view(1, -1)
    probe = torch.cat([probe, probe.flip(1).roll(17)], dim=1)
    with torch.no_grad():
        act: Callable[[Tensor], Tensor] = getattr(module, "_apply_gate" if gated else "act_fn")
        found = act(probe)
        for name, function in (_GATED if gated else _PLAIN).items():
            wanted = function(probe)
            if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-6, atol=1e-6):
                return name
    return None


def _refuse(module: nn.Module, expected: str, found: str) -> None:
    raise CaptureError(
        type(module).__name__,
        expected=expected,
        found=found,
        remedy="Its experts need an activation added to compiler/hf_experts.py.",
    )

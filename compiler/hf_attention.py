"""The attention of Hugging Face models as one custom op, `tilewright::attention`, and the hook that emits it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from .hf_masks import MaskSpec

INTERFACE = "tilewright"

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, float scale, bool is_causal, "
    "int? window, int? chunk, float? softcap) -> Tensor"
)


@torch.library.custom_op("tilewright::attention", mutates_args=(), schema=_SCHEMA)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
) -> Tensor:
    """Grouped attention of a whole sequence, with the arithmetic of transformers' eager functions.

    Args:
        q: [B, H, S, D]; k: [B, G, L, D]; v: [B, G, L, Dv], H a multiple of G; query i stands at position i + L - S.
        sinks: [H] logits that join the softmax and are dropped after it (gpt-oss); None without.
        bias: broadcastable to [B, H, S, L], added to the scaled scores; None without.
        scale: factor on q·k.
        is_causal, window, chunk: as in `MaskSpec`.
        softcap: scores become softcap * tanh(scores / softcap) before the mask (Gemma 2); None without.

    Returns:
        [B, S, H, Dv] in q's dtype; the softmax is taken in float32.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    length = k.shape[2]
    query = torch.arange(length - q.shape[2], length).view(-1, 1)
    allowed = MaskSpec(is_causal, window, chunk).allows(query, torch.arange(length).view(1, -1))
    scores = scores.masked_fill(~allowed.to(q.device), torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :length].to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


# What the hook may be given without any effect on the numbers of an inference without cache.
_HARMLESS = frozenset(
    [
        "dropout",
        "sliding_window",
        "output_attentions",
        "output_hidden_states",
        "use_cache",
        "position_ids",
        "cache_position",
        "return_dict",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "num_items_in_batch",
        "deterministic",
        "output_router_logits",
        "target_dtype",
        "layer_idx",
        "position_embeddings",
        "cache",
        "logits_to_keep",
    ]
)


def attention_hook(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskSpec | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' AttentionInterface: q [B, H, S, D], k, v [B, G, S, D] -> ([B, S, H, D], None).

    The mask is the MaskSpec that `mask_hook` recognised, so each layer gets the window of its own mask, whatever
    the layer says in `sliding_window` (eager and sdpa ignore that argument too).

    Raises:
        CaptureError: a mask that did not come from the mask hook, or an argument whose meaning is unknown.
    """
    if not isinstance(attention_mask, MaskSpec):
        _refuse(
            module,
            "a mask made by transformers' mask interface",
            f"{type(attention_mask).__name__}",
        )
    unknown = sorted(
        name for name, given in kwargs.items() if given is not None and name not in _HARMLESS
    )
    if unknown:
        _refuse(
            module,
            "only the known arguments of an attention function",
            f"also {', '.join(unknown)}",
        )
    if is_causal is not None and is_causal != attention_mask.causal:
        _refuse(
            module, f"is_causal={attention_mask.causal}, as the mask says", f"is_causal={is_causal}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = torch.ops.tilewright.attention(
        query,
        key,
        value,
        s_aux,
        position_bias,
        scale,
        attention_mask.causal,
        attention_mask.window,
        attention_mask.chunk,
        softcap,
    )
    return out, None


def _refuse(module: nn.Module, expected: str, found: str) -> None:
    raise CaptureError(
        f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})",
        expected=expected,
        found=found,
        remedy="The model is captured with its own attention arithmetic instead.",
    )

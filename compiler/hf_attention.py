"""Attention of Hugging Face models as custom ops, and the hooks that emit them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from .hf_masks import MaskSpec, PositionMask

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
        q: [B, H, S, D]; query i stands at position i + L - S.
        k: [B, G, L, D]; v: [B, G, L, Dv]; H is a multiple of G.
        sinks: [H] logits that join the softmax and are dropped after it (gpt-oss); None without.
        bias: broadcastable to [B, H, S, L], added to the scaled scores; None without.
        scale: factor on q·k.
        is_causal, window, chunk: as in `MaskSpec`.
        softcap: scores become softcap * tanh(scores / softcap) before the mask (Gemma 2).

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
    scores = _masked(scores, MaskSpec(is_causal, window, chunk))
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


@torch.library.custom_op(
    "tilewright::mask_scores",
    mutates_args=(),
    schema="(Tensor scores, bool is_causal, int? window, int? chunk) -> Tensor",
)
def mask_scores(scores: Tensor, is_causal: bool, window: int | None, chunk: int | None) -> Tensor:
    """Scores [..., S, L] with the dtype's lowest number where `MaskSpec` hides the key.

    Emitted where a model adds the mask to its scores by hand; query i stands at i + L - S.
    """
    return _masked(scores, MaskSpec(is_causal, window, chunk))


@mask_scores.register_fake
def _(scores: Tensor, is_causal: bool, window: int | None, chunk: int | None) -> Tensor:
    return torch.empty_like(scores)


def _masked(scores: Tensor, spec: MaskSpec) -> Tensor:
    num_queries, num_keys = scores.shape[-2:]
    query = torch.arange(num_keys - num_queries, num_keys).view(-1, 1)
    allowed = spec.allows(query, torch.arange(num_keys).view(1, -1))
    return scores.masked_fill(~allowed.to(scores.device), torch.finfo(scores.dtype).min)


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
    attention_mask: PositionMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' AttentionInterface: q [B, H, S, D], k, v [B, G, S, D] -> ([B, S, H, D], None).

    Each layer gets the window of its own mask, whatever it says in `sliding_window`: eager and sdpa
    ignore that argument too.

    Raises:
        CaptureError: a mask that did not come from the mask interface, or an unknown argument.
    """
    if not isinstance(attention_mask, PositionMask):
        found = type(attention_mask).__name__
        raise _refusal(module, "a mask made by transformers' mask interface", found)
    spec = attention_mask.spec
    unknown = [name for name, given in kwargs.items() if given is not None]
    unknown = sorted(set(unknown) - _HARMLESS)
    if unknown:
        raise _refusal(module, "known arguments of an attention function", ", ".join(unknown))
    if is_causal is not None and is_causal != spec.causal:
        raise _refusal(module, f"is_causal={spec.causal}, as the mask says", f"{is_causal=}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _attend(query, key, value, s_aux, position_bias, scale, spec, softcap), None


def sdpa_hook(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`F.scaled_dot_product_attention` that takes a PositionMask too and then emits the op."""

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | PositionMask | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not isinstance(attn_mask, PositionMask):
            return original(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = _attend(query, key, value, None, None, scale, attn_mask.spec, None)
        return out.transpose(1, 2)

    return scaled_dot_product_attention


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    scale: float,
    spec: MaskSpec,
    softcap: float | None,
) -> Tensor:
    out: Tensor = torch.ops.tilewright.attention(
        query, key, value, sinks, bias, scale, spec.causal, spec.window, spec.chunk, softcap
    )
    return out


def _refusal(module: nn.Module, expected: str, found: str) -> CaptureError:
    return CaptureError(
        f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})",
        expected=expected,
        found=found,
        remedy="The model is captured with its own attention arithmetic instead.",
    )

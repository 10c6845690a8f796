"""What changes a distribution before it is sampled, on logits f32[R, V] with one parameter a row.

Every cut is a threshold on the logit, so tokens of equal probability stay or go together and the
result does not depend on the order in which a sort leaves them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TOP_P_CANDIDATES = (1024, 8192)  # tried before a full sort, which costs ten times the first
_BLOCK = 256  # tokens: about as many as there are blocks
_COLDEST = 1e-30  # below it float32 has no inverse; any difference of logits is infinite by then


def keep_only(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits f32[V] of one row, all but those of the tokens i64[N] set to -inf."""
    kept = torch.full_like(logits, -torch.inf)
    return kept.index_copy_(-1, tokens, logits[tokens])


def add_bias(logits: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """Logits f32[V] of one row, with values f32[N] added to those of distinct tokens i64[N]."""
    return logits.index_add(-1, tokens, values)


def penalise(
    logits: Tensor,
    seen: Tensor,
    counts: Tensor,
    repetition: float,
    presence: float,
    frequency: float,
) -> Tensor:
    """Logits f32[V] of one row with the penalties taken off, repetition first.

    Args:
        seen: bool[V], tokens of the prompt or the output (repetition: Keskar et al. 2019).
        counts: i32[V], how often a token is in the output (presence and frequency: OpenAI's API).
    """
    if repetition != 1:
        scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen, scaled, logits)
    if presence or frequency:
        logits = logits - presence * (counts > 0) - frequency * counts
    return logits


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logits - their maximum) / temperature f64[R, 1]; shifted, for tiny temperatures."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted / temperature.clamp(min=_COLDEST).to(logits.dtype)


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """All but the top_k i64[R] likeliest tokens set to -inf; 0 keeps the row as it is."""
    last = top_k.clamp(1, logits.shape[-1])
    values = logits.topk(int(last.max()), dim=-1).values
    threshold = values.gather(-1, last[:, None] - 1)
    threshold = torch.where(top_k[:, None] > 0, threshold, -torch.inf)
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """All but the fewest tokens that hold top_p f64[R, 1] of the probability set to -inf
    (nucleus sampling, Holtzman et al. 2019); tokens as likely as the last of them stay too."""
    vocab = logits.shape[-1]
    total = logits.logsumexp(-1, keepdim=True).double()
    for count in (*_TOP_P_CANDIDATES, vocab):
        values = logits.topk(min(count, vocab), dim=-1).values
        mass = (values.double() - total).exp_().cumsum(-1)
        if count >= vocab or bool(((mass[:, -1:] >= top_p) | (top_p == 1)).all()):
            break
    last = (mass < top_p).sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)
    threshold = torch.where(top_p < 1, values.gather(-1, last), -torch.inf)
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Tokens less likely than min_p f64[R, 1] of the likeliest set to -inf (Nguyen et al. 2024)."""
    threshold = logits.amax(-1, keepdim=True) + min_p.log().to(logits.dtype)
    return logits.masked_fill(logits < threshold, -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token i64[R] a row of the softmax of logits [R, V], by inverting its distribution
    function at uniform f64[R, 1] in [0, 1). Summed in float64, for 100k small terms to add up.

    In two levels, blocks and then the tokens of one: along a row of a whole vocabulary a GPU sums
    with one block of threads, which takes half a millisecond.
    """
    mass = logits.softmax(-1)
    rows, size = mass.shape
    blocks = F.pad(mass, (0, -size % _BLOCK)).view(rows, -1, _BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    target = uniform * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=sums.shape[1] - 1)
    start = F.pad(ends, (1, 0)).gather(1, block)
    chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    inside = chosen.cumsum(-1, dtype=torch.float64)
    # Were the block's sum rounded up, the target could lie behind it, where no mass is.
    last = torch.nextafter(inside[:, -1:], inside.new_zeros(()))
    token = torch.searchsorted(inside, torch.minimum(target - start, last), right=True)
    return (block * _BLOCK + token).clamp_(max=size - 1).squeeze(-1)

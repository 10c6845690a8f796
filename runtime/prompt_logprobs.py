"""Log-probabilities of a prompt's own tokens, from the logits of the rows before them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .output import TokenLogprobs
from .sampling import check_finite

_ROWS = 32  # at once, for their float64 copy to stay small: 32 MB of a vocabulary of 128k


def token_logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """What the model gave to each token.

    Args:
        logits: f32[R, V], of the row before each token.
        tokens: R of them.
        count: alternatives to report beside each.

    Raises:
        VerificationError: a row has NaN or infinite logits.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(tokens), _ROWS):
        found += _block(logits[start : start + _ROWS], tokens[start : start + _ROWS], count)
    return found


def _block(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    check_finite(logits.amax(-1).tolist())
    logprobs = logits.detach().double().log_softmax(-1)
    own = logprobs.gather(-1, logprobs.new_tensor(tokens).long()[:, None])[:, 0].tolist()
    top = logprobs.topk(min(count, logprobs.shape[-1]))
    rows = zip(tokens, own, top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in rows
    ]

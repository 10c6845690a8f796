"""Tokens chosen on the device from a step's logits, by torch functions that do not wait for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ir.schema import schema
from .filters import apply_temperature, draw
from .grammar import banned, mask_block
from .params import SamplingParams
from .step_buffer import SAMPLING

Masks: TypeAlias = Sequence[NDArray[np.int32] | None]
"""Of each row what may come next (`Matcher.words`), None for any."""
Kind: TypeAlias = Literal["greedy", "random", "cut"]
"""The largest logit, a draw, or a draw after top-k, top-p or min-p, which sorts the vocabulary."""


def choose_masked(
    logits: Tensor, tokens: Tensor, masks: Masks, fields: Mapping[str, Tensor], *, kind: Kind
) -> None:
    """Writes the tokens of the rows with masks; nothing waits for the device.

    Args:
        logits: [R, V] of floats, R at least as many as there are masks; the rest is padding.
        tokens: i64[R]; -1 is written where no logit that may come is finite.
        masks: of the first rows.
        fields: how each row is sampled, [R] each (`step_buffer.SAMPLING`).
        kind: what the rows need.
    """
    count = len(masks)
    left_out = banned(mask_block(masks, logits.shape[-1]), logits.shape[-1], logits.device)
    scores = torch.where(left_out, -torch.inf, logits[:count].float())
    given = {name: fields[name][:count] for name in SAMPLING if name in fields}
    tokens[:count] = torch.where(left_out.any(-1), choose(scores, given, kind), tokens[:count])


def kind_of(params: Sequence[SamplingParams]) -> Kind:
    """What rows with these parameters need."""
    if all(one.is_greedy for one in params):
        return "greedy"
    cuts = any(one.top_k or one.top_p < 1 or one.min_p for one in params)
    return "cut" if cuts else "random"


def choose(scores: Tensor, fields: Mapping[str, Tensor], kind: Kind) -> Tensor:
    """Tokens i64[R] of logits f32[R, V], -1 where no largest one is finite; nothing waits.

    Args:
        scores: the logits.
        fields: how each row is sampled, [R] each (`step_buffer.SAMPLING`).
        kind: what the rows need.
    """
    if kind == "cut":
        found = schema("sample").reference(scores, *(fields[name] for name in SAMPLING))
        assert isinstance(found, Tensor)
        return found
    best, tokens = scores.max(-1)
    if kind == "random":
        temperature = fields["temperature"]
        scaled = apply_temperature(scores, temperature[:, None])
        drawn = draw(scaled, fields["uniform"].double()[:, None])
        tokens = torch.where(temperature > 0, drawn, tokens)
    return torch.where(best.isfinite(), tokens, -1)

"""Tokens of rows whose form leaves some out, chosen on the device from a decode step's logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ir.schema import schema
from .grammar import banned, mask_block
from .step_buffer import SAMPLING

Masks: TypeAlias = Sequence[NDArray[np.int32] | None]
"""Of each row what may come next (`Matcher.words`), None for any."""


def choose_masked(
    logits: Tensor, tokens: Tensor, masks: Masks, fields: Mapping[str, Tensor] | None
) -> None:
    """Writes the tokens of the rows with masks; nothing waits for the device.

    Args:
        logits: [R, V] of floats, R at least as many as there are masks; the rest is padding.
        tokens: i64[R]; -1 is written where no logit that may come is finite.
        masks: of the first rows.
        fields: how each row is sampled, [R] each (`step_buffer.SAMPLING`); None if all are greedy.
    """
    count = len(masks)
    left_out = banned(mask_block(masks, logits.shape[-1]), logits.shape[-1], logits.device)
    scores = torch.where(left_out, -torch.inf, logits[:count].float())
    if fields is None:
        best, found = scores.max(-1)
        found = torch.where(best.isfinite(), found, -1)
    else:
        given = [fields[name][:count] for name in SAMPLING]
        found = schema("sample").reference(scores, *given)
    tokens[:count] = torch.where(left_out.any(-1), found, tokens[:count])

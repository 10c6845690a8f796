"""Steps to measure: many sequences of one length, over pages in random order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....runtime.image import LMConfig
from ....runtime.step import Step


@dataclass(frozen=True, slots=True)
class StepSetting:
    """What a step brings.

    Attributes:
        name: "decode b1".
        sequences: how many.
        tokens: new ones of each sequence.
        context: length of each sequence, these tokens included.
    """

    name: str
    sequences: int
    tokens: int
    context: int


DECODES = "decode"
"""How the settings begin in which every sequence brings one token."""
SETTINGS = (
    StepSetting("decode b1", 1, 1, 512),
    StepSetting("decode b32", 32, 1, 512),
    StepSetting("prefill 512", 1, 512, 512),
)


def fits(setting: StepSetting, lm: LMConfig) -> bool:
    """Whether an engine takes such a step."""
    return setting.sequences <= lm.max_batch_size and setting.context <= lm.max_model_len


def pages_of(setting: StepSetting, page_size: int) -> int:
    """Pages of one sequence."""
    return -(-setting.context // page_size)


def make_step(setting: StepSetting, lm: LMConfig, seed: int = 0) -> Step:
    """A step of random tokens; every sequence has pages of its own, page 0 is left alone."""
    generator = torch.Generator().manual_seed(seed)
    count, new, page = setting.sequences, setting.tokens, lm.page_size
    pages = pages_of(setting, page)
    tables = 1 + torch.randperm(count * pages, generator=generator).view(count, pages)
    positions = torch.arange(setting.context - new, setting.context)
    slots = tables[:, positions // page] * page + positions % page
    ends = torch.arange(1, count + 1) * new
    return Step(
        torch.randint(lm.vocab_size, (count * new,), generator=generator),
        positions.repeat(count),
        torch.cat((torch.zeros(1, dtype=torch.long), ends)).int(),
        torch.full((count,), setting.context, dtype=torch.int32),
        slots.reshape(-1).contiguous(),
        tables.int(),
        ends - 1,
    )

"""How many pages the KV pool has: as many as its sequences can need, or as memory has room for."""

from __future__ import annotations

import math

import torch

from ..codegen.plan import plan_buffers
from ..codegen.program import Program
from ..errors import CapacityError, UsageError
from .decode_graphs import obstacles
from .image import LMConfig
from .scheduler import STEP_TOKENS

PREFILL_TOKENS = 8192
"""Tokens of a step while no sequence decodes, where memory is plenty: longer products are a little
quicker, and calls fewer.
"""

_PLENTY = 40 << 30  # bytes of a device's memory: temporaries of so many tokens are a few percent
_LIBRARIES = 192 << 20  # workspaces of cuBLAS on two streams, the allocator's rounding
_BOUND = ("T", "R", "B", "M", "N", "P")


def prefill_tokens(program: Program, config: LMConfig, device: torch.device) -> int:
    """The token budget of a step while no sequence decodes, `STEP_TOKENS` at least.

    It stays there where attention runs in torch, whose scores grow with the square of the tokens.
    """
    if device.type != "cuda" or obstacles(program):
        return STEP_TOKENS
    _, total = torch.cuda.mem_get_info(device)
    wanted = min(PREFILL_TOKENS, config.max_model_len * config.max_batch_size)
    return max(STEP_TOKENS, wanted if total >= _PLENTY else 0)


def pool_pages(
    config: LMConfig,
    page_bytes: int,
    programs: tuple[Program, ...],
    device: torch.device,
    tokens: int = STEP_TOKENS,
) -> int:
    """Pages of the pool, the reserved one included.

    Args:
        config: how many sequences of which length there may be.
        page_bytes: KV bytes of a page over all layers.
        programs: that run beside it; their weights are on the device.
        device: where the pool is to lie.
        tokens: the most of a step.

    Raises:
        CapacityError: not even one sequence of full length has room.
    """
    longest = config.most_pages
    wanted = longest * config.max_batch_size + 1
    if device.type != "cuda":
        return wanted
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    used = total - free - held  # what torch holds unused, the pool can have
    beside = sum(step_bytes(program, config, tokens) for program in programs) + _LIBRARIES
    beside += sum(captured_bytes(program, config, tokens) for program in programs)
    room = int(config.memory_fraction * total) - used - beside
    fitting = room // page_bytes
    if fitting < longest + 1:
        raise _too_little(config, page_bytes * (longest + 1), room, used, beside, total)
    return min(wanted, fitting)


def step_bytes(program: Program, config: LMConfig, tokens: int = STEP_TOKENS) -> int:
    """Bytes of a Program's temporaries and results in its largest step, of so many tokens."""
    rows = max(config.max_batch_size, 8)
    tokens = rows if "query_start" not in program.inputs else max(tokens, rows)
    pages = config.most_pages
    values = (tokens, rows, rows, pages, 1, config.page_size)
    plan = plan_buffers(program, dict(zip(_BOUND, values, strict=True)))
    logits = rows * config.vocab_size * 6  # in the model's type, and as float32
    return plan.peak + logits


def captured_bytes(program: Program, config: LMConfig, tokens: int) -> int:
    """Bytes that the graphs of a Program's steps hold beside those that are not captured; 0 for one
    of decode steps alone, which run in no other way.
    """
    if "query_start" not in program.inputs or obstacles(program):
        return 0
    return step_bytes(program, config, tokens)


def check_swap_space(option: str, value: object) -> None:
    """UsageError for all but a number of GiB, 0 or more."""
    if type(value) not in (int, float) or not 0 <= float(str(value)) < math.inf:
        raise UsageError(
            option,
            expected="a number of GiB, 0 or more",
            found=repr(value),
            remedy="Give a valid number, or leave it out.",
        )


def _too_little(
    config: LMConfig, needed: int, room: int, used: int, beside: int, total: int
) -> CapacityError:
    least = (used + beside + needed) / total
    longest = "max_model_len" if config.window is None else "the window"
    knobs = f"Lower {longest} or max_batch_size"
    if least <= 1.0:
        knobs += f", or raise memory_fraction to {math.ceil(least * 100) / 100:g} or more"
    return CapacityError(
        "the KV pool",
        expected=f"room for one sequence of {config.most_pages * config.page_size} tokens: "
        f"{needed / 1e9:.2f} GB "
        f"beside {used / 1e9:.2f} GB in use (weights and others) and {beside / 1e9:.2f} GB for "
        "the steps",
        found=f"{max(room, 0) / 1e9:.2f} GB within memory_fraction={config.memory_fraction:g} of "
        f"{total / 1e9:.2f} GB",
        remedy=f"{knobs}.",
    )

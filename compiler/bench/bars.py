"""What ours has to reach: ratios to contenders, and shares of the floor.

Those for a GPU are of an H100 and bfloat16, for the two shapes that peers were measured with: 8B
(Llama 3 8B) and 1B (Llama 3.2 1B), prompts of 512 tokens at batch 1 and of 1024 beyond. Shares of
the floor at batch 8 to 128 are what the ratio to vLLM comes to, where vLLM itself cannot be run:
its own share, times the ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FLOOR = "floor"


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio that ours has to reach.

    Attributes:
        phase: "decode" or "prefill".
        against: the contender, or FLOOR: the share of the floor.
        value: ours over theirs, in tokens a second.
    """

    phase: str
    against: str
    value: float

    @property
    def name(self) -> str:
        """Tells it from the others of one measurement."""
        return f"{self.phase} / {self.against}"


SHAPES = {"8B": 15_010_000_000, "1B": 2_472_000_000}
"""Bytes of the weights that a decode step reads, in bfloat16."""
ALIKE = 0.03  # of the bytes: a cache of some hundred tokens is counted with them

BARS: Mapping[str, tuple[Bar, ...]] = {
    "cpu": (Bar("decode", "eager", 1.65), Bar("prefill", "eager", 1.0)),
    "cuda": (Bar("decode", "torch.compile", 1.0),),
}
"""By kind of device, for models of any shape, batch 1."""

SHAPE_BARS: Mapping[tuple[str, int], tuple[Bar, ...]] = {
    ("8B", 1): (
        Bar("decode", "torch.compile", 1.5),
        Bar("decode", "vllm", 1.13),
        Bar("decode", FLOOR, 0.88),
    ),
    ("8B", 8): (Bar("decode", "vllm", 1.15), Bar("decode", FLOOR, 0.75 * 1.15)),
    ("8B", 32): (Bar("decode", "vllm", 1.12), Bar("decode", FLOOR, 0.79 * 1.12)),
    ("8B", 128): (Bar("decode", "vllm", 1.10), Bar("decode", FLOOR, 0.82 * 1.10)),
    ("1B", 1): (Bar("decode", FLOOR, 0.60),),
    ("1B", 32): (Bar("decode", "vllm", 1.6),),
}
"""By shape and batch, on a GPU; in place of what BARS has for the same contender."""


def find_bars(device: str, read_bytes: int, batch: int = 1) -> tuple[Bar, ...]:
    """The bars of a measurement.

    Args:
        device: "cpu", or a GPU's name.
        read_bytes: that a step must read for its weights.
        batch: sequences of a step.
    """
    if device == "cpu":
        return BARS["cpu"] if batch == 1 else ()
    near = [name for name, size in SHAPES.items() if abs(read_bytes - size) <= ALIKE * size]
    own = SHAPE_BARS.get((near[0], batch), ()) if near else ()
    taken = {(bar.phase, bar.against) for bar in own}
    general = BARS["cuda"]  # no batch makes it right to be slower than torch.compile
    return (*own, *(bar for bar in general if (bar.phase, bar.against) not in taken))

"""Paged attention over codes for the tuner: the spaces of the plain kernels, other kernels."""

from __future__ import annotations

from ....autotune.space import Config
from ....ir.node import Node
from ....targets import Target
from ..kernels import (
    paged_attention,
    paged_attention_kernel,
    paged_attention_tiles,
    paged_decode,
    paged_decode_kernel,
    paged_decode_tiles,
    scaled_attention,
    scaled_attention_kernel,
    scaled_decode,
    scaled_decode_kernel,
    scaled_tiles,
)
from ..kernels.paged_attention_tiles import Problem
from ..kernels.prefill_steps import Steps
from ..kernels.scaled_attention import scaled_attention_source
from ..kernels.scaled_decode import scaled_decode_source
from ..kernels.scaled_tiles import (
    decode_shared_bytes,
    decode_tiles,
    prefill_shared_bytes,
    prefill_tiles,
    scaled_problem,
)
from ..source import KernelSource
from . import attention, decode
from .problem import layouts_of
from .template import Sizes


class ScaledDecode(decode.PagedDecode):
    """As over numbers; a problem names the codes too."""

    name = "scaled_decode"
    modules = (
        *(scaled_decode, scaled_decode_kernel, scaled_tiles),
        *(paged_decode, paged_decode_kernel, paged_decode_tiles, paged_attention_tiles),
    )
    op = "scaled_paged_attention"

    def serves(self, node: Node, target: Target) -> bool:
        """Also the target has a type for the codes."""
        there = self.takes(node) and scaled_problem(node, layouts_of(node), target) is not None
        return there and super().serves(node, target)

    def tiles(self, problem: Problem, target: Target) -> paged_decode_tiles.Tiles | None:
        """``decode_tiles``."""
        return decode_tiles(problem, target)

    def shared(self, problem: Problem, tiles: paged_decode_tiles.Tiles) -> int:
        """``decode_shared_bytes``."""
        return decode_shared_bytes(problem, tiles)

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel of a cut."""
        return scaled_decode_source(decode.problem_of(node), decode.tiles_of(config), target)


class ScaledAttention(attention.PagedAttention):
    """As over numbers; a problem names the codes too."""

    name = "scaled_attention"
    modules = (
        *(scaled_attention, scaled_attention_kernel, scaled_decode_kernel, scaled_tiles),
        *(paged_attention, paged_attention_kernel, paged_attention_tiles),
    )
    op = "scaled_paged_attention"

    def serves(self, node: Node, target: Target) -> bool:
        """Also the target has a type for the codes."""
        there = self.takes(node) and scaled_problem(node, layouts_of(node), target) is not None
        return there and super().serves(node, target)

    def tiles(
        self, problem: Problem, target: Target, steps: Steps
    ) -> paged_attention_tiles.Tiles | None:
        """``prefill_tiles``, whatever the steps."""
        return prefill_tiles(problem, target)

    def shared(self, problem: Problem, tiles: paged_attention_tiles.Tiles) -> int:
        """``prefill_shared_bytes``."""
        return prefill_shared_bytes(problem, tiles)

    def source(
        self, node: Node, config: Config, sizes: Sizes, target: Target
    ) -> KernelSource | None:
        """The kernel with this one cut."""
        return scaled_attention_source(attention.problem_of(node), attention.tiles_of(config))

"""What a tuner tells the emitters of kernels other than decode products."""

from __future__ import annotations

from typing import Protocol

from ...ir.node import Node
from .generate_index import Cut
from .kernels import experts_tiles, paged_attention_tiles, paged_decode_tiles
from .kernels.prefill_steps import Steps
from .kernels.wide_linear_tiles import WideTiles


class Cuts(Protocol):
    """The cut of each call; None leaves the default, where nothing else is said."""

    def decode(self, node: Node, sequences: int) -> paged_decode_tiles.Tiles | None:
        """Of paged decode attention over up to ``sequences`` of them."""

    def prefill(self, node: Node, steps: Steps) -> paged_attention_tiles.Tiles | None:
        """Of paged attention over more tokens than sequences, in some kind of steps."""

    def expert_rows(self, node: Node) -> experts_tiles.Rows | None:
        """Of experts, for few tokens."""

    def expert_groups(self, node: Node, block_m: int) -> experts_tiles.Groups | None:
        """Of experts, for as many tokens as tiles of ``block_m`` pairs are taken for."""

    def walk(self, node: Node) -> Cut | None:
        """Of a generated kernel."""

    def wide(self, node: Node, tokens: int, default: WideTiles | None) -> WideTiles | None:
        """Of a product of many tokens, for ``tokens`` at least; None for the library's."""

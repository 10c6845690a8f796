"""The problems of a decode graph: each distinct call that a template takes, at each number of
tokens that has a cut of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ....ir.dims import Dim
from ....ir.graph import Graph
from ....ir.node import Node
from ....targets import Target
from .decode import PagedDecode, sizes_of
from .linear import BUCKETS, LinearGemm, LinearGemv, problem_of
from .registry import TEMPLATES
from .template import Sizes, Template
from .tunable import KernelTunable


def problems_of(
    graph: Graph, target: Target, max_sequences: int, context: int, page_size: int
) -> Sequence[KernelTunable]:
    """What can be tuned in a decode graph, each problem once, in the graph's order.

    Args:
        graph: the decode graph.
        target: the device.
        max_sequences: most of them in a step: products are tuned up to there.
        context: tokens of a sequence, that attention is tuned at.
        page_size: tokens of a page.
    """
    found: dict[str, KernelTunable] = {}
    for node in graph.nodes:
        for template, sizes in _pairs(node, max_sequences, context, page_size):
            tunable = KernelTunable.of(template, node, sizes, target)
            found.setdefault(tunable.key.digest, tunable)
    return list(found.values())


def token_sizes(node: Node, tokens: int) -> Sizes:
    """The sizes of a linear for so many tokens."""
    symbol = problem_of(node).tokens
    return {str(symbol): tokens} if isinstance(symbol, Dim) else {}


def _pairs(
    node: Node, max_sequences: int, context: int, page_size: int
) -> Iterator[tuple[Template, Sizes]]:
    for template in TEMPLATES:
        if not template.takes(node):
            continue
        if isinstance(template, LinearGemv):
            yield template, token_sizes(node, 1)
        elif isinstance(template, LinearGemm):
            for size in BUCKETS:
                if size == BUCKETS[0] or size // 2 < max_sequences:
                    yield template, token_sizes(node, size)
        elif isinstance(template, PagedDecode):
            yield template, sizes_of(node, min(max_sequences, 8), context, page_size)

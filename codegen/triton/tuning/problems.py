"""The problems of a graph: each distinct product of a decode graph, at each number of tokens that
has a cut of its own, and dense attention of fixed sizes. (Decode attention has one cut for all
batches and lengths, so what is found at one of them cannot be used: its template is there for the
tuner's own benchmark.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ....ir.dims import Dim
from ....ir.graph import Graph
from ....ir.node import Node
from ....targets import Target
from .attention import Attention
from .linear import BUCKETS, LinearGemm, LinearGemv, problem_of
from .template import Sizes, Template
from .tunable import KernelTunable

GEMV, GEMM, ATTENTION = LinearGemv(), LinearGemm(), Attention()


def problems_of(graph: Graph, target: Target, max_sequences: int) -> Sequence[KernelTunable]:
    """What can be tuned in a graph, each problem once, in the graph's order.

    Args:
        graph: that of decode steps, or of a plain module.
        target: the device.
        max_sequences: most of them in a step: products are tuned up to there.
    """
    found: dict[str, KernelTunable] = {}
    for node in graph.nodes:
        for template, sizes in _pairs(node, max_sequences):
            tunable = KernelTunable.of(template, node, sizes, target)
            found.setdefault(tunable.key.digest, tunable)
    return list(found.values())


def token_sizes(node: Node, tokens: int) -> Sizes:
    """The sizes of a linear for so many tokens."""
    symbol = problem_of(node).tokens
    return {str(symbol): tokens} if isinstance(symbol, Dim) else {}


def _pairs(node: Node, max_sequences: int) -> Iterator[tuple[Template, Sizes]]:
    if ATTENTION.takes(node):
        yield ATTENTION, {}
    if not GEMM.takes(node):
        return
    yield GEMV, token_sizes(node, 1)
    for size in BUCKETS:
        if size == BUCKETS[0] or size // 2 < max_sequences:
            yield GEMM, token_sizes(node, size)

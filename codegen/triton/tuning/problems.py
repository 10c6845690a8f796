"""The problems of a graph. Of decode steps: each distinct product at each number of tokens, and
attention at each number of sequences, that has a cut of its own. Of other graphs: products, with
what stands behind them, at each number of tokens from which there is a choice; paged attention over
many tokens, and dense attention of fixed sizes. Of all: experts at each number of tokens that
has a cut of its own, and generated kernels at one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ....ir.dims import Dim
from ....ir.graph import Graph
from ....ir.node import Node
from ....targets import Target
from ..kernels.paged_decode import buckets
from ..kernels.prefill_steps import steps_of
from ..wide import BUCKETS as WIDE_BUCKETS
from ..wide import wide_products
from .attention import PagedAttention, step_sizes
from .attention import problem_of as prefill_problem
from .coded_linear import Coded, QuantGemm, QuantGemv
from .decode import PagedDecode, mixed_sizes
from .dense_attention import DenseAttention
from .experts import ExpertGroups, ExpertRows, group_sizes
from .experts import row_sizes as expert_row_sizes
from .linear import BUCKETS, LinearGemm, LinearGemv, problem_of
from .scaled import ScaledAttention, ScaledDecode
from .template import Sizes, Template
from .tunable import KernelTunable
from .walks import Elementwise, Rows, row_sizes
from .wide_linear import WideLinear

GEMV, GEMM = LinearGemv(), LinearGemm()
QUANT_GEMV, QUANT_GEMM = QuantGemv(), QuantGemm()
DECODE, PREFILL, ATTENTION = PagedDecode(), PagedAttention(), DenseAttention()
DECODES = (DECODE, ScaledDecode())
PREFILLS = (PREFILL, ScaledAttention())
EXPERT_ROWS, EXPERT_GROUPS = ExpertRows(), ExpertGroups()
WALKS = (Rows(), Elementwise())
WIDE = WideLinear()


def problems_of(
    graph: Graph, target: Target, max_sequences: int | None, max_model_len: int | None = None
) -> Sequence[KernelTunable]:
    """What can be tuned in a graph, each problem once: products of many tokens, then all else, in
    the graph's order.

    Args:
        graph: as it is lowered.
        target: the device.
        max_sequences: of a decode graph, most of them in a step: kernels are tuned up to there.
            None: the graph is the general one, or that of a plain module.
        max_model_len: tokens of the longest sequence; None: not known.
    """
    found: dict[str, KernelTunable] = {}
    products = () if max_sequences is not None else wide_products(graph, target)
    for product in products:
        node = product.problem.node
        for tokens in WIDE_BUCKETS:
            tunable = KernelTunable.of(WIDE, node, token_sizes(node, tokens), target)
            found.setdefault(tunable.key.digest, tunable)
    for node in graph.nodes:
        for template, sizes in _pairs(node, target, max_sequences, max_model_len):
            tunable = KernelTunable.of(template, node, sizes, target)
            found.setdefault(tunable.key.digest, tunable)
    return list(found.values())


def decode_of(node: Node) -> PagedDecode:
    """The template for sequences of one token each, by what the cache holds."""
    return next(template for template in DECODES if template.op == node.op)


def prefill_of(node: Node) -> PagedAttention:
    """The template for any mix of tokens, by what the cache holds."""
    return next(template for template in PREFILLS if template.op == node.op)


def token_sizes(node: Node, tokens: int) -> Sizes:
    """The sizes of a linear, over numbers or codes, for so many tokens."""
    coded = Coded.of(node)
    symbol = (problem_of(node) if coded is None else coded.problem).tokens
    return {str(symbol): tokens} if isinstance(symbol, Dim) else {}


def _pairs(
    node: Node, target: Target, max_sequences: int | None, max_model_len: int | None
) -> Iterator[tuple[Template, Sizes]]:
    for gemv, gemm in ((GEMV, GEMM), (QUANT_GEMV, QUANT_GEMM)):
        if gemm.serves(node, target):
            yield gemv, token_sizes(node, 1)
            for size in BUCKETS:
                if max_sequences is None or size == BUCKETS[0] or size // 2 < max_sequences:
                    yield gemm, token_sizes(node, size)
            return
    if any(template.serves(node, target) for template in DECODES):
        for size in buckets(max_sequences):
            yield decode_of(node), mixed_sizes(node, size, max_model_len)
    elif any(template.serves(node, target) for template in PREFILLS):
        for steps in steps_of(prefill_problem(node), target):
            yield prefill_of(node), step_sizes(node, steps)
    elif EXPERT_GROUPS.serves(node, target):
        if EXPERT_ROWS.serves(node, target):
            yield EXPERT_ROWS, expert_row_sizes(node)
        for _, sizes in group_sizes(node, max_sequences):
            yield EXPERT_GROUPS, sizes
    elif ATTENTION.takes(node):
        yield ATTENTION, {}
    else:
        for template in WALKS:
            if template.serves(node, target):
                yield template, row_sizes(node, max_sequences)

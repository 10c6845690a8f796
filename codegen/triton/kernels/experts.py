"""Mixtures of experts: each token through its own k experts, without a word from the host.

Few tokens, whose pairs (a token and one of its slots) hardly share an expert, take a program for
each pair and few rows of its expert: two launches. More tokens are first put in order of their
experts, each expert's pairs from the start of a tile on; then each tile is a product with the
weights of one expert, and a last launch adds up each token's slots. Grids hold as many tiles as
there can be, so they depend on the number of tokens alone, and a CUDA graph may hold them.

Sums are float32. As in the op's reference, what ``down`` takes is rounded to the model's type, and
in the kernels for many tokens what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ..cuts import Cuts
from ..generate_text import helper_text
from ..layout import Layout
from ..source import HEADER, KernelSource, jit_text
from . import (
    experts_kernel,
    experts_order_kernel,
    linear_kernel,
    wide_experts_kernel,
    wide_linear_kernel,
)
from .entries import described
from .experts_tiles import (
    OPERANDS,
    PRODUCTS,
    Groups,
    Problem,
    Rows,
    buckets,
    default_rows,
    invariant_groups,
    most_row_tokens,
)
from .wide_experts import SHARED_FUNCTIONS, WIDE_FUNCTIONS, WideEntries
from .wide_experts_tiles import WideTiles, default_tiles

_ORDER = ("_expert_of", "_most_tiles", "_turn", "_turned", "_place", "_own", "_count", "_find")
_FUNCTIONS = (
    *("_tile_of", "_within", "_sums", "_pairs_of_sums", "_activated", "_gate_up", "_down"),
    *("_weighted", "_gate_up_rows", "_down_rows"),
)
_HELPERS = ("_silu(", "_gelu(", "_gelu_tanh(", "_relu(", "_sigmoid(")


def emit_experts(
    node: Node,
    layouts: tuple[Layout | None, ...],
    target: Target,
    cuts: Cuts | None = None,
    most: int | None = None,
) -> KernelSource | None:
    """A kernel for ``moe_experts`` in float32, float16 or bfloat16, cut as ``cuts`` says for up to
    ``most`` tokens (None: any number; more are right all the same).

    None where the element type is another, a size of the weights is symbolic, an operand has no
    static place, x or a matrix of weights no axis that lies in one piece, a bias is a view, or no
    tile fits the target's shared memory.
    """
    problem = Problem.of(node, layouts)
    if problem is None:
        return None
    groups: list[tuple[Groups, int | None]] = []
    for block_m, limit in buckets(problem, most):
        tiles = default_tiles(problem, target, block_m)
        if tiles is None:
            return None
        chosen = None if cuts is None else cuts.expert_groups(node, block_m)
        groups.append((chosen or tiles, limit))
    if not problem.in_rows:
        return experts_source(problem, target, None, groups, most)
    rows = None if cuts is None else cuts.expert_rows(node)
    default = default_rows(problem, "gate_up"), default_rows(problem, "down")
    return experts_source(problem, target, rows or default, groups, most)


def emit_invariant_experts(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """As ``emit_experts``, with one cut for any number of tokens: a token's sums come in one order,
    whatever it is computed with.
    """
    problem = Problem.of(node, layouts)
    if problem is None:
        return None
    gate_up, down = (invariant_groups(problem, product, target) for product in PRODUCTS)
    if gate_up is None or down is None:
        return None
    return experts_source(problem, target, None, [((gate_up, down), None)])


def experts_source(
    problem: Problem,
    target: Target,
    rows: Rows | None,
    groups: Sequence[tuple[Groups, int | None]],
    most: int | None = None,
) -> KernelSource:
    """The kernel of a problem with these tiles.

    Args:
        problem: what it computes.
        target: the device.
        rows: of gate_up and down, for up to ``most_row_tokens`` tokens; None: as for more.
        groups: for more tokens, each with the most that it is for; the last one is for any number.
            Without any, the kernel is never called for more than the ``rows``.
        most: tokens that the last one is made for; None: many.
    """
    wide = any(isinstance(tiles[0], WideTiles) for tiles, _ in groups)
    entries = WideEntries(problem, target)
    variants = []
    if rows is not None:
        guard = (most_row_tokens(problem) - problem.tokens,) if groups else ()
        variants.append(entries.in_rows(rows, guard))
    for index, (tiles, limit) in enumerate(groups):
        last = index == len(groups) - 1
        guard = () if last or limit is None else (limit - problem.tokens,)
        variants.append(entries.in_any_groups(tiles, most if last else limit, guard))
    texts = (
        HEADER,
        described(problem.node, OPERANDS),
        helper_text(_HELPERS),
        jit_text(linear_kernel, ("_weights", "_inputs", "_one_token")),
        jit_text(experts_order_kernel, _ORDER),
        jit_text(experts_kernel, _FUNCTIONS),
        jit_text(wide_linear_kernel, SHARED_FUNCTIONS) if wide else "",
        jit_text(wide_experts_kernel, WIDE_FUNCTIONS) if wide else "",
        *entries.texts.values(),
    )
    contracts = problem.dtype is not DType.F32
    return KernelSource("experts", "template", "".join(texts), tuple(variants), contracts)

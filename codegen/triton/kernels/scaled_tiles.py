"""Which attention over codes kernels take, and what is different in how they are cut.

The cuts are those of the plain kernels (paged_decode_tiles.py, paged_attention_tiles.py): a tile
has as many keys, of half the bytes while they are on their way, and again in the query's type once
they are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ..layout import Layout
from . import paged_attention_tiles, paged_decode_tiles
from .append_kv import FP8_SINCE
from .paged_attention_tiles import Problem, block

OPERANDS = (
    *("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start", "sinks", "alibi"),
    *("k_scale", "v_scale", "q_sinks"),
)
"""Of a ``scaled_paged_attention``: those of a ``paged_attention``, and two more among them."""


def scaled_problem(
    node: Node, layouts: Sequence[Layout | None], target: Target | None = None
) -> Problem | None:
    """What a ``scaled_paged_attention`` asks for; None where the kernels do not take it, or where
    the target, if one is given, has no type for the codes.
    """
    old = target is not None and 0 < target.arch < FP8_SINCE
    if node.op != "scaled_paged_attention" or (old and codes_of(node) is DType.F8E4M3):
        return None
    if any(scales.dtype is not DType.F32 for scales in scales_of(node)):
        return None
    return Problem.of(node, layouts)


def codes_of(node: Node) -> DType:
    """The element type of its caches."""
    return node.operands[1].dtype


def scales_of(node: Node) -> tuple[Node, Node]:
    """The scales of its keys and of its values."""
    k_scale, v_scale = node.args[8:10]
    assert k_scale is not None and v_scale is not None
    return k_scale, v_scale


def decode_tiles(
    problem: Problem, target: Target, fixed_split_keys: int | None = None
) -> paged_decode_tiles.Tiles | None:
    """The first default of the plain kernel that fits; None where none does."""
    widest = max(block(problem.head_dim), block(problem.value_dim))
    for width, tiles in paged_decode_tiles.DEFAULTS[problem.node.dtype is DType.F32]:
        if widest <= width and decode_fits(problem, tiles, target):
            return replace(tiles, fixed_split_keys=fixed_split_keys)
    return None


def decode_fits(problem: Problem, tiles: paged_decode_tiles.Tiles, target: Target) -> bool:
    """Whether a tile fits the target's shared memory."""
    return decode_shared_bytes(problem, tiles) <= target.shared_memory_per_block


def decode_shared_bytes(problem: Problem, tiles: paged_decode_tiles.Tiles) -> int:
    """Shared memory of a block, an upper bound: codes and scales in flight, one tile of numbers,
    queries, weights, page ids and what the warps exchange.
    """
    rows = paged_decode_tiles.block_rows(problem)
    return _shared_bytes(problem, rows, tiles.block_n, max(tiles.num_stages - 1, 1)) + (2 << 10)


def prefill_tiles(problem: Problem, target: Target) -> paged_attention_tiles.Tiles | None:
    """As ``decode_tiles``, for more tokens than sequences."""
    widest = max(block(problem.head_dim), block(problem.value_dim))
    for width, tiles in paged_attention_tiles.PREFILL[problem.node.dtype is DType.F32]:
        fitting = replace(tiles, block_m=max(tiles.block_m, block(problem.chunk_heads)))
        if widest <= width and prefill_fits(problem, fitting, target):
            return fitting
    return None


def prefill_fits(problem: Problem, tiles: paged_attention_tiles.Tiles, target: Target) -> bool:
    """Whether a tile fits the target's shared memory."""
    return prefill_shared_bytes(problem, tiles) <= target.shared_memory_per_block


def prefill_shared_bytes(problem: Problem, tiles: paged_attention_tiles.Tiles) -> int:
    """As ``decode_shared_bytes``."""
    return _shared_bytes(problem, tiles.block_m, tiles.block_n, tiles.num_stages) + (1 << 10)


def _shared_bytes(problem: Problem, rows: int, keys: int, stages: int) -> int:
    dims = block(problem.head_dim) + block(problem.value_dim)
    in_flight = stages * keys * (dims + 8)
    resident = keys * dims + rows * (block(problem.head_dim) + keys)
    return in_flight + resident * problem.node.dtype.bytes

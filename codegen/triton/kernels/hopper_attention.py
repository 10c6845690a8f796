"""Prefill attention on Hopper: which calls the kernel with warps that load takes, and its launch.
Where it is quicker than the plain one, and how it is cut, prefill_steps.py says.

On an H100, 32 heads of 128, it takes 0.93 to 1.06 and 0.89 to 0.99 of cuDNN's time for 8192 and
2048 tokens (two runs), where the kernel that any target takes (paged_attention_kernel.py) takes 1.5
to 1.8 (benchmarks/NOTES.md). Queries, keys and values are told to it by tensor maps of the host,
since maps of its own cost a launch 1.5 to 2 us (tensor_map.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ....ir.dims import call
from ....ir.dtypes import DType
from ....targets import Target
from ..source import Constexpr, Described, Launch, Pointer, Role, Scalar
from .entries import Entry, entry_of
from .paged_attention_tiles import Problem, Tiles, shared_bytes

ARCH = 90
"""Whose products (wgmma) the kernel is written for; no other architecture has them."""

HEADER = """from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)
"""
LOADS = ("_item_sequence", "_work", "_tell", "_told", "_bring", "_produce")
FUNCTIONS = (
    "_softmax",
    "_clear",
    "_pass",
    "_multiply",
    "_consume",
    "_attend_hopper",
)
ROWS, WARPS = 128, 8  # two warp groups of 64 rows
BLOCK_NS, STAGES = (64, 128), (2, 3, 4)

_PAGES = (16, 32, 64, 128)
_COLUMNS = 64  # of a box: a line of 128 bytes
_TOLD = ("block_tables", "seq_lens", "query_start")
_LINE = 8  # elements of 16 bytes: where rows begin that TMA reads


_BOTH_WAYS = Tiles(ROWS, 64, WARPS, 4, both_ways=True)
_KEYS_64 = Tiles(ROWS, 64, WARPS, 4)
_KEYS_128 = Tiles(ROWS, 128, WARPS, 2)
_NARROW = Tiles(ROWS, 128, WARPS, 4)  # heads of 64 leave room
_CUTS: Mapping[int, Mapping[str, Tiles]] = {
    128: {"mixed": _BOTH_WAYS, "few": _KEYS_64, "long": _KEYS_128, "usual": _KEYS_64},
    64: {"mixed": _NARROW, "long": _NARROW, "usual": _KEYS_128},
}
"""By head dim and kind of steps; ``programs`` is the target's."""


def why_not(problem: Problem, target: Target) -> str | None:
    """Why the kernel does not compute a problem on a target; None where it does."""
    p, node = problem, problem.node
    group = p.heads // p.kv_heads
    page = node.operands[1].shape[1]
    added = [node.args[6], node.args[7], p.softcap, p.num_sinks or None]
    refusals = (
        (target.arch != ARCH, f"sm_{target.arch}: the products are those of sm_{ARCH}"),
        (node.op != "paged_attention", f"{node.op}: codes would have to be converted on the way"),
        (p.node.dtype not in (DType.F16, DType.BF16), f"{node.dtype}: not of 16 bits"),
        (any(x is not None for x in added), "something is added to scores, or they are capped"),
        (p.scale <= 0, f"scale {p.scale}: maxima are those of unscaled scores"),
        (p.head_dim not in _CUTS or p.value_dim != p.head_dim, f"heads of {p.head_dim}"),
        (p.heads % p.kv_heads or group & (group - 1) or group > 64, f"groups of {group} heads"),
        (isinstance(page, int) and page not in _PAGES, f"pages of {page}"),
        (not _in_lines(p), "rows of q that begin between lines of 16 bytes"),
    )
    return next((reason for refused, reason in refusals if refused), None)


def takes_tiles(problem: Problem, tiles: Tiles, target: Target) -> bool:
    """Whether a cut is one of the kernel's, on a target where it takes the problem."""
    page = problem.node.operands[1].shape[1]
    return (
        (tiles.block_m, tiles.num_warps) == (ROWS, WARPS)
        and not (isinstance(page, int) and page > tiles.block_n)  # it brings whole pages
        and tiles.block_n in BLOCK_NS
        and tiles.num_stages in STAGES
        and shared_bytes(problem, tiles) <= target.shared_memory_per_block
    )


def default_hopper(problem: Problem, target: Target, steps: str) -> Tiles | None:
    """The cut without tuning, for a kind of steps by its name; None where the plain kernel is the
    quicker one, or the target lacks the shared memory.
    """
    tiles = _CUTS[problem.head_dim].get(steps)
    tiles = None if tiles is None else replace(tiles, programs=target.sms)
    return tiles if tiles is not None and takes_tiles(problem, tiles, target) else None


def hopper_entry(problem: Problem, name: str, tiles: Tiles, page: int) -> Entry:
    """The launch of a cut, for pages of ``page`` tokens: ``tiles.programs`` programs, one on each
    multiprocessor, that share the tiles of rows.
    """
    p, node = problem, problem.node
    group, (stride_t, stride_h, _) = p.heads // p.kv_heads, p.q.strides
    k_cache, _, tables = node.operands[1:4]
    rows, width = k_cache.shape[0] * page, p.kv_heads * p.head_dim

    def buffer(index: int) -> tuple[DType, Role, int]:
        return node.operands[index].dtype, "operand", index

    rows_of_q = (p.num_tokens, p.heads, p.head_dim), (stride_t, stride_h, 1)
    tokens = ROWS // 2 // group  # of a warp group
    pages = ((rows, width), (width, 1), (page, _COLUMNS))
    arguments = (
        Described("q_desc", *buffer(0), p.q.offset, *rows_of_q, (tokens, group, _COLUMNS)),
        Described("k_desc", *buffer(1), 0, *pages),
        Described("v_desc", *buffer(2), 0, *pages),
        *(Pointer(name, *buffer(index)) for index, name in enumerate(_TOLD, 3)),
        Pointer("out", node.dtype, "result", 0),
    )
    # As many tiles of rows as paged_attention.py has.
    items = (p.num_tokens // (ROWS // group) + p.num_seqs + 2) * p.kv_heads
    sizes = (
        Scalar("num_tokens", p.num_tokens),
        Scalar("num_seqs", p.num_seqs),
        Scalar("num_pages", k_cache.shape[0]),
        Scalar("table_width", tables.shape[1]),
        Scalar("num_items", items),
    )
    constants: dict[str, Constexpr | None] = {
        "KV_HEADS": p.kv_heads,
        "GROUP": group,
        "HEAD_DIM": p.head_dim,
        "SCALE": p.scale,
        "CAUSAL": bool(node.attr("causal")),
        "WINDOW": p.window or 0,
        "PAGE": page,
    }
    cut: dict[str, Constexpr] = {
        "BLOCK_N": tiles.block_n,
        "STAGES": tiles.num_stages,
        "BOTH_WAYS": tiles.both_ways,
    }
    grid = (call("min", tiles.programs, items), 1, 1)
    # The warps of one group are declared; the kernel adds the other's, and those that load.
    launch = Launch(name, arguments, grid, cut, WARPS // 2)
    return entry_of(launch, "_attend_hopper", sizes, constants, "gluon.jit")


def _in_lines(problem: Problem) -> bool:
    """Whether q's rows lie as TMA reads them."""
    places = (problem.q.offset, *problem.q.strides[:2])
    return problem.q.strides[2] == 1 and all(
        isinstance(place, int) and place % _LINE == 0 for place in places
    )

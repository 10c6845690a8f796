"""Attention over a paged KV cache: decode with split keys, and ragged prefill, in Triton.

Where sequences bring a token each (T <= B), each one's keys are split over programs and a second
launch merges the parts (Flash-Decoding); else one launch does it all. Both run the same kernel
(paged_attention_kernel.py), but where Hopper has one of its own for prefill: there prefill has a
variant for each kind of steps (prefill_steps.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ....ir.dims import Size, call, is_nonnegative
from ....ir.dtypes import DType
from ....ir.node import Node
from ....targets import Target
from ..cuts import Cuts
from ..layout import Layout
from ..source import HEADER, Constexpr, KernelSource, Launch, Pointer, Scalar, Variant, jit_text
from . import (
    hopper_attention,
    hopper_attention_kernel,
    hopper_attention_loads,
    paged_attention_kernel,
)
from .entries import Entry, described, entry_of
from .hopper_attention import hopper_entry
from .paged_attention_tiles import (
    DECODE,
    MAX_SPLITS,
    PREFILL,
    Problem,
    Tiles,
    block,
    default_tiles,
    num_splits,
)
from .prefill_steps import Share, default_prefill, shares_of

PAGE = 16
"""Tokens of a page in most caches: there is a variant for them, and they are what is timed."""

_OPERANDS = (
    "q",
    "k_cache",
    "v_cache",
    "block_tables",
    "seq_lens",
    "query_start",
    "sinks",
    "alibi",
    "q_sinks",
)
_PARTS = ("partial_acc", "partial_max", "partial_sum")
_ANY_PAGE = Tiles(64, 64, 4, 2)
"""Of the plain kernel, where hopper_attention.py has the usual pages."""


def emit_paged_attention(
    node: Node, layouts: tuple[Layout | None, ...], target: Target, cuts: Cuts | None = None
) -> KernelSource | None:
    """Kernels for a ``paged_attention`` in float32, float16 or bfloat16, that for more tokens than
    sequences cut as ``cuts`` says.

    None where the element type is another, an operand but q is a strided view, a number of heads
    or a head dim is symbolic, no tile fits the target's shared memory, or each sequence has one
    token by definition (no ``query_start``: paged_decode.py).
    """
    if node.args[5] is None:
        return None
    problem = Problem.of(node, layouts)
    if problem is None:
        return None
    decode = default_tiles(problem, target, DECODE)
    if decode is None or default_prefill(problem, target) is None:
        return None
    shares = shares_of(
        problem, target, lambda steps: None if cuts is None else cuts.prefill(node, steps)
    )
    return paged_attention_source(problem, decode, shares, num_splits(problem, target))


def emit_invariant_attention(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """As ``emit_paged_attention``, with one cut and no splits: a token meets its keys in one order,
    tile by tile, whatever it is computed with. Tiles that it sees nothing of change no bit.
    """
    problem = None if node.args[5] is None else Problem.of(node, layouts)
    tiles = None if problem is None else default_tiles(problem, target, PREFILL)
    return None if problem is None or tiles is None else prefill_source(problem, tiles)


def paged_attention_source(
    problem: Problem, decode: Tiles, prefill: Sequence[Share], splits: Size
) -> KernelSource:
    """The kernel of a problem with these tiles; ``splits`` (1 to 32) share a sequence in decode. Of
    ``prefill`` the first share whose guard holds is taken; the last has none.
    """
    spare = problem.num_seqs - problem.num_tokens
    entries: list[Entry] = []
    variants: list[Variant] = []
    if not is_nonnegative(-1 - spare):  # else T > B always
        split, variant = _split(problem, decode, splits)
        entries += split
        variants.append(replace(variant, guard=() if is_nonnegative(spare) else (spare,)))
    if not is_nonnegative(spare):
        whole, chosen = _whole(problem, prefill)
        entries += whole
        variants += chosen
    return _source(problem, entries, variants)


def prefill_source(problem: Problem, tiles: Tiles) -> KernelSource:
    """The kernel of a problem with one cut, for any numbers of tokens and sequences."""
    return _source(problem, *_whole(problem, (Share(tiles),)))


def _whole(problem: Problem, shares: Sequence[Share]) -> tuple[list[Entry], list[Variant]]:
    """The kernel without splits. Where the graph leaves the page size open, those for the usual
    pages come first: their rows find their pages by shifts.
    """
    size = problem.node.operands[1].shape[1]
    page = size if isinstance(size, int) else PAGE
    usual = () if isinstance(size, int) else (size - PAGE, PAGE - size)
    entries: dict[str, Entry] = {}  # cuts are no part of an entry's text
    variants = []
    plain = "prefill_plain" if any(share.tiles.programs for share in shares) else "prefill"
    for share in shares:
        if share.tiles.programs:
            entry = hopper_entry(problem, "prefill", share.tiles, page)
        else:
            entry = _attend(problem, plain, share.tiles, 1, (), page)
        entries.setdefault(entry.text, entry)
        variants.append(Variant((entry.launch,), guard=(*share.guard, *usual)))
    if usual:
        tiles = _ANY_PAGE if shares[-1].tiles.programs else shares[-1].tiles
        other = _attend(problem, "prefill_any", tiles, 1, ())
        entries[other.text] = other
        variants.append(Variant((other.launch,)))
    return list(entries.values()), variants


def _source(
    problem: Problem, entries: Sequence[Entry], variants: Sequence[Variant]
) -> KernelSource:
    functions = ("_sequence_of", "_tanh", "_seen", "_weights_of", "_meet", "_attend", "_merge")
    texts = [
        HEADER,
        described(problem.node, _OPERANDS),
        jit_text(paged_attention_kernel, functions),
    ]
    if any("@gluon.jit" in entry.text for entry in entries):
        texts.insert(1, hopper_attention.HEADER)
        texts.append(jit_text(hopper_attention_loads, hopper_attention.LOADS))
        texts.append(jit_text(hopper_attention_kernel, hopper_attention.FUNCTIONS))
    texts += [entry.text for entry in entries]
    return KernelSource(
        "paged_attention", "template", "".join(texts), tuple(variants), contracts=True
    )


def _split(problem: Problem, tiles: Tiles, splits: Size) -> tuple[list[Entry], Variant]:
    if splits == 1:
        whole = _attend(problem, "decode", tiles, 1, ())
        return [whole], Variant((whole.launch,))
    parts = tuple(Pointer(name, DType.F32, "workspace", i) for i, name in enumerate(_PARTS))
    # One split writes the result itself: nothing is kept, and the merge has no programs.
    several = call("min", 1, splits - 1)
    count = problem.num_tokens * problem.heads * splits * several
    spaces = ((DType.F32, count * problem.value_dim), (DType.F32, count), (DType.F32, count))
    split = _attend(problem, "decode", tiles, splits, parts)
    merge = _merge(problem, splits, several, parts)
    return [split, merge], Variant((split.launch, merge.launch), spaces)


def _attend(
    problem: Problem,
    name: str,
    tiles: Tiles,
    splits: Size,
    parts: tuple[Pointer, ...],
    page: int | None = None,
) -> Entry:
    node = problem.node
    operands = tuple(
        Pointer(operand, arg.dtype, "operand", index)
        for index, (operand, arg) in enumerate(zip(_OPERANDS, node.args, strict=False))
        if arg is not None
    )
    pointers = (*operands, Pointer("out", node.dtype, "result", 0), *parts)
    constants: dict[str, Constexpr | None] = {
        "KV_HEADS": problem.kv_heads,
        "GROUP": problem.heads // problem.kv_heads,
        "HEAD_CHUNKS": problem.head_chunks,
        "HEAD_DIM": problem.head_dim,
        "VALUE_DIM": problem.value_dim,
        "BLOCK_D": block(problem.head_dim),
        "BLOCK_E": block(problem.value_dim),
        "SCALE": problem.scale,
        "SOFTCAP": problem.softcap,
        "CAUSAL": bool(node.attr("causal")),
        "WINDOW": problem.window,
        "NUM_SINKS": problem.num_sinks,
        "PAGE": page,
        # A step of decode waits for memory, not for masks.
        "INNER": name != "decode",
    }
    absent = dict.fromkeys(_OPERANDS + _PARTS)
    tiling = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
    # Each sequence starts a tile of its own, so there are B more than T rows fill; one more for the
    # rows behind the last sequence, one for those before the first.
    count = problem.num_tokens // (tiles.block_m // problem.chunk_heads) + problem.num_seqs + 2
    grid = (count, problem.kv_heads * problem.head_chunks, splits)
    sizes = (*_sizes(problem), Scalar("splits", splits))
    launch = Launch(name, pointers, grid, tiling, tiles.num_warps, tiles.num_stages)
    return entry_of(launch, "_attend", sizes, absent | constants)


def _merge(problem: Problem, splits: Size, several: Size, parts: tuple[Pointer, ...]) -> Entry:
    pointers = (*parts, Pointer("out", problem.node.dtype, "result", 0))
    constants: dict[str, Constexpr | None] = {
        "HEADS": problem.heads,
        "VALUE_DIM": problem.value_dim,
        "BLOCK_E": block(problem.value_dim),
        "BLOCK_S": MAX_SPLITS,
    }
    grid = (problem.num_tokens * several, problem.heads, 1)
    launch = Launch("merge", pointers, grid)
    return entry_of(launch, "_merge", (Scalar("splits", splits),), constants)


def _sizes(problem: Problem) -> tuple[Scalar, ...]:
    _, k_cache, _, block_tables = problem.node.operands[:4]
    stride_t, stride_h, stride_d = problem.q.strides
    return (
        Scalar("q_offset", problem.q.offset, "i64"),
        Scalar("q_stride_t", stride_t, "i64"),
        Scalar("q_stride_h", stride_h, "i64"),
        Scalar("q_stride_d", stride_d, "i64"),
        Scalar("num_tokens", problem.num_tokens),
        Scalar("num_seqs", problem.num_seqs),
        Scalar("num_pages", k_cache.shape[0]),
        Scalar("table_width", block_tables.shape[1]),
        Scalar("page_size", k_cache.shape[1]),
    )

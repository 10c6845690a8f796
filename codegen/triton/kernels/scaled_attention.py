"""Attention over a paged cache of codes, for any mix of tokens: the kernel of paged_attention.py
with scales, in Triton.

It has one cut for all steps: steps of a token a sequence have a graph of their own, and with it
scaled_decode.py. So it is as well what a deterministic Program takes.
"""

from __future__ import annotations

from ....ir.node import Node
from ....targets import Target
from ..cuts import Cuts
from ..layout import Layout
from ..source import HEADER, Constexpr, KernelSource, Launch, Pointer, Scalar, Variant, jit_text
from . import paged_attention_kernel, scaled_attention_kernel, scaled_decode_kernel
from .entries import described, entry_of
from .paged_attention import _sizes
from .paged_attention_tiles import Problem, Tiles, block
from .prefill_steps import WHOLE
from .scaled_tiles import OPERANDS, prefill_tiles, scaled_problem


def emit_scaled_attention(
    node: Node, layouts: tuple[Layout | None, ...], target: Target, cuts: Cuts | None = None
) -> KernelSource | None:
    """A kernel for a ``scaled_paged_attention`` with ``query_start``, as ``emit_paged_attention``
    has it; None also where the target has no type for the codes.
    """
    problem = None if node.args[5] is None else scaled_problem(node, layouts, target)
    tiles = None if problem is None else prefill_tiles(problem, target)
    if problem is None or tiles is None:
        return None
    found = None if cuts is None else cuts.prefill(node, WHOLE)
    return scaled_attention_source(problem, found or tiles)


def emit_invariant_scaled_attention(
    node: Node, layouts: tuple[Layout | None, ...], target: Target
) -> KernelSource | None:
    """The same with the default cut: a token meets its keys in one order, whatever it is computed
    with.
    """
    return emit_scaled_attention(node, layouts, target)


def scaled_attention_source(problem: Problem, tiles: Tiles) -> KernelSource:
    """The kernel of a problem with this cut, for any numbers of tokens and sequences."""
    node = problem.node
    operands = tuple(
        Pointer(name, arg.dtype, "operand", index)
        for index, (name, arg) in enumerate(zip(OPERANDS, node.args, strict=True))
        if arg is not None
    )
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
    }
    absent: dict[str, Constexpr | None] = dict.fromkeys(("sinks", "alibi", "q_sinks"))
    # Each sequence starts a tile of its own, see paged_attention.py.
    count = problem.num_tokens // (tiles.block_m // problem.chunk_heads) + problem.num_seqs + 2
    launch = Launch(
        "prefill",
        (*operands, Pointer("out", node.dtype, "result", 0)),
        (count, problem.kv_heads * problem.head_chunks, 1),
        {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n},
        tiles.num_warps,
        tiles.num_stages,
    )
    sizes: tuple[Scalar, ...] = _sizes(problem)
    entry = entry_of(launch, "_scaled_attend", sizes, absent | constants)
    texts = (
        HEADER,
        described(node, OPERANDS),
        jit_text(paged_attention_kernel, ("_sequence_of", "_tanh", "_seen", "_weights_of")),
        jit_text(scaled_decode_kernel, ("_weighted",)),
        jit_text(scaled_attention_kernel, ("_scaled_meet", "_scaled_attend")),
        entry.text,
    )
    return KernelSource(
        "scaled_attention",
        "template",
        "".join(texts),
        (Variant((entry.launch,)),),
        contracts=True,
    )
